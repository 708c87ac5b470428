"""What it takes to round a model to fewer bits: names, sizes, time and memory of the GGUF types and of the folders of 4-bit weights.

GPTQ and AWQ work on one decoder layer after another (hermes/model/compressed.py), with the whole model on the device. Their constants are
from SmolLM2 on two cores with `bits: portable` and groups of 32. GPTQ took 92 s there for 128 pairs (10,263 tokens), and AWQ 73 s for 16.
"""

from hermes.model.llama3 import Shape
from hermes.settings.compress import Method
from hermes.settings.experiment import Profile
from hermes.settings.quantize import GgufType

# A weight, about: what llama.cpp lists for Llama 3.1 8B. A type that falls back, for rows that its blocks do not divide, takes more.
BITS: dict[str, float] = {
    "f16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_1": 6.04, "Q5_K_M": 5.7, "Q5_K_S": 5.57, "Q5_0": 5.57, "Q4_1": 5.11, "Q4_K_M": 4.89,
    "IQ4_NL": 4.68, "Q4_K_S": 4.67, "Q4_0": 4.64, "IQ4_XS": 4.46, "Q3_K_L": 4.3, "Q3_K_M": 4.0, "IQ3_M": 3.76, "Q3_K_S": 3.64,
    "IQ3_XXS": 3.25, "Q2_K": 3.16, "IQ2_M": 2.93,
}  # fmt: skip
SIZES = (128, 64, 32)  # of a group, that null chooses from
# Weights a second on two CPU cores, as the committed rehearsal did them: written as f16, and quantized to one more type. A folder of 4-bit
# weights is taken to be written and read like f16.
CONVERTED, QUANTIZED = 8e9 / 130, 8e9 / 320
IMPORTANCE = 1.3  # of evaluation's forward over the same tokens; an assumption, 20 s for the default profile
COLUMN = 0.26e-3  # seconds that Python takes to round one column of a matrix in GPTQ; a GPU's are taken to be as many
TRIED, ROUNDED = 20, 300  # scalings that AWQ tries, and bytes that it moves to round a weight once


def weights_of(shape: Shape) -> int:
    """How many a model of this shape has."""
    return shape.linear_weights + shape.other_weights


def gguf_types(loaded: Profile, shape: Shape) -> tuple[GgufType, ...]:
    """The types made beside f16. A ladder goes by whether 256 divides the inputs of most weights."""
    divided = sum(inputs * outputs for inputs, outputs in shape.linear.values() if inputs % 256 == 0)
    return loaded.quantize.named(2 * divided * shape.layers >= shape.linear_weights)


def evaluated(loaded: Profile, shape: Shape) -> tuple[str, ...]:
    """What is evaluated beside base and merged."""
    asked = loaded.evaluate.types
    return (*gguf_types(loaded, shape), *loaded.compress.methods) if isinstance(asked, str) else tuple(asked)


def gguf_size(kind: str, shape: Shape) -> int:
    """Bytes of a GGUF file."""
    return round(weights_of(shape) * BITS[kind] / 8)


def folder_size(loaded: Profile, shape: Shape) -> int:
    """Bytes of a folder of 4-bit weights: a group has a scale of 16 bits and a zero point of 4, and the other weights have 16 bits."""
    widths = [inputs for inputs, _ in shape.linear.values()]
    fitting = (size for size in SIZES if not any(width % size for width in widths))
    group = loaded.compress.group_size or next(fitting, SIZES[-1])
    return round(shape.linear_weights * (4 + 20 / group) / 8) + 2 * shape.other_weights


def quantize_seconds(loaded: Profile, shape: Shape, tokens: float, flops: float) -> float:
    """Time of all GGUF files, and of the importance matrix where there is one, whose calibration pairs have so many tokens each."""
    made = weights_of(shape) / CONVERTED + len(gguf_types(loaded, shape)) * weights_of(shape) / QUANTIZED
    forward = 2 * shape.linear_weights * tokens * loaded.calibration.pairs / flops
    return made + IMPORTANCE * forward * loaded.quantize.imatrix


def compress_seconds(loaded: Profile, shape: Shape, tokens: float, flops: float, bandwidth: float) -> float:
    """Time of all folders of 4-bit weights, with calibration pairs of so many tokens each.

    GPTQ runs each layer twice, sums up the products of all inputs, inverts them, and takes the error of a column to those behind it. AWQ
    rounds the weights of a layer and runs it for each scaling.
    """
    sizes, seen = shape.linear.values(), loaded.calibration.pairs * tokens
    work = 4 * shape.linear_weights * seen
    work += shape.layers * sum(2 * seen * a**2 + 4 / 3 * a**3 + b * a**2 for a, b in sizes)
    columns = shape.layers * sum(inputs for inputs, _ in sizes)
    scaled = 2 * loaded.compress.awq_pairs * tokens / flops + ROUNDED / bandwidth  # seconds a weight and scaling
    seconds = {"gptq": work / flops + COLUMN * columns, "awq": TRIED * shape.linear_weights * scaled}
    return sum(seconds[method] + 2 * weights_of(shape) / CONVERTED for method in loaded.compress.methods)


def compress_memory(loaded: Profile, shape: Shape, tokens: float, longest: int, size: int) -> int:
    """Bytes of the device that making the folders takes, with `size` bytes a weight, pairs of so many tokens each and the longest.

    All weights, and the largest of three:

        logits  of the longest pair, and of the one before it
        gptq    a layer's products of inputs in float32, one for each matrix, and the widest once more; or the widest three times, while the
                matrix is rounded in float32
        awq     what its pairs put into a layer and what comes out, the gated unit's matrices once more, and the largest matrix while it is
                rounded
    """
    if not loaded.compress.methods:
        return 0
    products = [inputs**2 for inputs, _ in shape.linear.values()]
    largest = max(inputs * outputs for inputs, outputs in shape.linear.values())
    seen = loaded.compress.awq_pairs * tokens * (4 * shape.hidden + shape.intermediate)
    needed: dict[Method, float] = {
        "gptq": 4 * max(sum(products) + max(products), 3 * max(products) + 3 * largest),
        "awq": size * (seen + 2 * shape.hidden * shape.intermediate + 8 * largest),
    }
    most = max(2 * longest * shape.vocabulary * size, *(needed[method] for method in loaded.compress.methods))
    return size * weights_of(shape) + round(most)


def compress_host(loaded: Profile, shape: Shape, tokens: float) -> int:
    """Bytes of the host's memory beside a GPU: the model in 16 bits, which passes through it, and what all pairs put into a layer."""
    if not loaded.compress.methods:
        return 0
    return 2 * weights_of(shape) + round(2 * loaded.calibration.pairs * tokens * shape.hidden)
