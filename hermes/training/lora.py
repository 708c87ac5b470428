"""LoRA layers whose update is added to the base's output by the matrix product itself, in the base's own type.

PEFT's forward copies the base's output, casts the input to the adapter's float32, multiplies at the float32 rate, scales, casts back
and adds. Here the adapter's weights stay float32, since updates of bfloat16 ones round away, and are cast for the products alone, as
autocast would do. PEFT owns everything else: the modules, their weights, dropout, saving and merging.
"""

import types
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from hermes.settings.train import TrainSettings


def lora_config(settings: TrainSettings) -> LoraConfig:
    """The adapter that is trained, as PEFT describes it."""
    modules = settings.lora_modules
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=modules if isinstance(modules, str) else sorted(modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


class AddUpdate(torch.autograd.Function):
    """`output + scaling * (inputs @ a.T) @ b.T`, in place; the gradients of a and b are products in the base's type, cast to float32."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Adds the update of `a` (rank, in) and `b` (out, rank) for `inputs` (..., in) to `output` (..., out)."""
        rows = inputs.reshape(-1, inputs.size(-1))
        a, b = a.to(rows.dtype), (b * scaling).to(rows.dtype)
        reduced = rows @ a.T
        output.view(-1, output.size(-1)).addmm_(reduced, b.T)
        ctx.mark_dirty(output)
        ctx.save_for_backward(rows, reduced, a, b)
        ctx.shape, ctx.scaling = inputs.shape, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients by output, inputs, a and b."""
        rows, reduced, a, b = ctx.saved_tensors
        wanted = gradients[0].reshape(-1, gradients[0].size(-1))
        by_reduced = wanted @ b
        by_inputs = (by_reduced @ a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        by_a = (by_reduced.T @ rows).float()
        by_b = (wanted.T @ reduced).float().mul_(ctx.scaling)
        return gradients[0], by_inputs, by_a, by_b, None


def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The base's output and the active adapters' updates; replaces the forward of PEFT's linear LoRA layers."""
    if self.merged:
        raise RuntimeError("the adapter is merged into its base, and the fused update would add it again")
    output = self.base_layer(x)
    if output._is_view():  # of a product with a bias, in bitsandbytes' function: autograd forbids to change it in place
        output = output.clone()
    for name in () if self.disable_adapters else self.active_adapters:
        if name in self.lora_A:
            inputs = self.lora_dropout[name](x)
            output = AddUpdate.apply(
                output, inputs, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
            )
    return output


def fuse_updates(model: PeftModel) -> None:
    """Gives every LoRA layer of a model the forward above.

    Raises:
        ValueError: a layer of another kind than plain LoRA on a linear layer, or one that is merged.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if module.merged or module.lora_variant or module.lora_embedding_A or any(module.lora_bias.values()):
                raise ValueError(f"{name}: only plain LoRA on a linear layer has a fused update")
            vars(module)["forward"] = types.MethodType(forward, module)
