"""Section `train`, the optimization, and the science on top of params.yaml that it follows."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hermes.params import Settings, each_once
from hermes.settings.base import Count, CountOrZero

Beta = Annotated[float, Field(gt=0, le=1000)]
PositiveFiniteFloat = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip

# PEFT's names of other adapters, and what there is here.
VARIANTS = {
    "use_dora": "DoRA is not trained here, and only plain LoRA is merged",
    "use_rslora": "rank-stabilized LoRA is plain LoRA whose `lora_alpha` is multiplied by the root of `lora_rank`",
    "init_lora_weights": "LoRA begins with B at zero here, so that the first loss is ln 2",
    "modules_to_save": "only LoRA is trained here",
}


class TrainSettings(Settings):
    """The optimization: adapter, schedule, batches."""

    lora_rank: Annotated[int, Field(gt=0, le=65536)]
    lora_alpha: Annotated[int, Field(gt=0, le=1_000_000)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    lora_modules: Annotated[list[Name], Field(min_length=1)] | Literal["all-linear"]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    sft_weight: Annotated[float, Field(ge=0, le=1000)]
    schedule: Literal["cosine", "linear", "constant_with_warmup"]
    warmup_steps: CountOrZero
    warmup_ratio: Annotated[float, Field(ge=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1000)]
    max_grad_norm: PositiveFiniteFloat
    optimizer: Literal["adamw_torch", "paged_adamw_32bit"]
    epochs: PositiveFiniteFloat
    max_steps: Count | None
    batch_size: Count
    accumulation: Count
    gradient_checkpointing: bool
    evaluations: CountOrZero
    checkpoint_steps: Count
    processes: Count
    distribution: Literal["ddp", "fsdp"]

    @model_validator(mode="before")
    @classmethod
    def _is_plain_lora(cls, values: Any) -> Any:
        for name, instead in VARIANTS.items():
            if isinstance(values, dict) and name in values:
                raise ValueError(f"`{name}`: {instead}; take it out")
        return values

    @field_validator("lora_modules")
    @classmethod
    def _modules_once(cls, modules: Any) -> Any:
        return modules if isinstance(modules, str) else each_once(modules)

    def adapts(self, layer: str) -> bool:
        """Whether the linear layers of this name get an adapter."""
        return self.lora_modules == "all-linear" or layer in self.lora_modules

    @field_validator("processes")
    @classmethod
    def _share_steps_equally(cls, processes: int, info: ValidationInfo) -> int:
        accumulation = info.data.get("accumulation", processes)
        if accumulation % processes:
            raise ValueError(
                f"it must divide accumulation ({accumulation}), since each process takes its part of a step's forwards; "
                "a smaller batch_size with a larger accumulation is the same step"
            )
        return processes

    @field_validator("distribution")
    @classmethod
    def _shard_over_several(cls, distribution: str, info: ValidationInfo) -> str:
        if distribution == "fsdp" and info.data.get("processes") == 1:
            raise ValueError("there is nothing to shard with one process; set processes to 2 or more, or ddp")
        return distribution


class Science(Settings):
    """The keys above the profiles."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    beta: Beta
    loss_type: LossType
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> "Science":
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("`loss_type: exo_pair` needs a `label_smoothing` above 0, such as 0.001")
        return self
