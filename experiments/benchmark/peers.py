"""diffusers in PyTorch beside this package: the same shapes, about the same operations, the same machine and run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

from experiments import vp_cifar10
from experiments.benchmark.table import Row, Target, interleaved, on_cpu
from experiments.benchmark.training import Steps, resized
from gddim.errors import UserError
from gddim.parallel import batch_sharding
from gddim.samplers import GDDIM, power_grid, sample
from gddim.samplers.words import sampler_name

SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "DEIS": "DEISMultistepScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
}
REST = 0.5  # seconds for which OpenMP's idle threads may still hold the cores of the other


def peers() -> Iterator[Row]:
    """Training step and sampling on VP at 32×32×3, side by side."""
    try:
        diffusers, torch = (importlib.import_module(name) for name in ("diffusers", "torch"))
    except ImportError as error:
        raise UserError(f"needs diffusers and PyTorch: pip install 'gddim[peers]' ({error})") from error
    for batch, nfe in ((8, 20), (64, 4)) if on_cpu() else ((128, 20), (1024, 4)):
        yield from beside(diffusers, torch, 32 if on_cpu() else 128, batch, nfe)


def beside(diffusers: Any, torch: Any, width: int, batch: int, nfe: int, repeats: int = 4) -> Iterator[Row]:
    """The rows of one width and batch."""
    blocks, dtype = 2, "float32" if on_cpu() else "bfloat16"
    ours = Steps(resized(vp_cifar10.EXPERIMENT, batch, width=width, blocks=blocks, dropout=0.0, dtype=dtype))
    place = "cuda" if torch.cuda.is_available() and not on_cpu() else "cpu"
    theirs = unet(diffusers, width, blocks).to(place)
    flops = ours.plan.step_flops(), batch * torch_image_flops(torch, theirs, place)
    update = torch_step(torch, theirs, batch, place)
    seconds, other = interleaved(ours, update, repeats=repeats, rest=REST)
    title = f"training step, batch {batch}: ours, {flops[0] / batch / 1e9:.3g} GFLOP an image"
    baseline = f"UNet2DModel, {flops[1] / batch / 1e9:.3g} GFLOP an image"
    yield Row(title, batch / seconds, "images/s", baseline, batch / other)
    rates = [number / time / 1e9 for number, time in zip(flops, (seconds, other), strict=True)]
    target = None if place == "cpu" else Target("ratio", "≥", 2.0)
    yield Row("the same per operation: ours", rates[0], "GFLOP/s", "UNet2DModel", rates[1], target)

    draw = sampler_of(ours, batch, nfe)
    for name, scheduler in SCHEDULERS.items():
        peer = torch_sampler(torch, getattr(diffusers, scheduler)(), theirs, batch, nfe, place)
        seconds, other = interleaved(draw, peer, repeats=max(repeats // 2, 1), rest=REST)
        title = f"sampling, NFE {nfe}, batch {batch}: {sampler_name(GDDIM(3))}"
        yield Row(title, batch / seconds, "images/s", f"diffusers' {name}", batch / other)


def sampler_of(steps: Steps, batch: int, nfe: int) -> Callable[[], Any]:
    """gDDIM of order 3 with the network of a training step."""
    model, sde = steps.plan.model(steps.state.ema), vp_cifar10.EXPERIMENT.sde
    u = jax.random.normal(jax.random.key(0), (batch, *vp_cifar10.EXPERIMENT.state_shape))
    u = jax.device_put(u, batch_sharding(steps.plan.mesh))
    ts = power_grid(sde.horizon, 1e-3, nfe)
    program = eqx.filter_jit(lambda model, u: jax.vmap(lambda u: sample(GDDIM(3), sde, model, u, ts))(u))
    return lambda: program(model, u)


def unet(diffusers: Any, width: int, blocks: int) -> Any:
    """diffusers' U-Net with the widths and the attention, of one head, of ours."""
    down = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=blocks, norm_num_groups=8, attention_head_dim=2 * width,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width), down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
    )  # fmt: skip


def torch_image_flops(torch: Any, net: Any, place: str) -> float:
    """Operations of loss and gradient of one image, as PyTorch counts them."""
    counting = importlib.import_module("torch.utils.flop_counter")
    x, t = torch.randn(1, 3, 32, 32, device=place), torch.zeros(1, device=place)
    with counting.FlopCounterMode(display=False) as counter:
        net(x, t).sample.square().mean().backward()
    net.zero_grad()
    return counter.get_total_flops()


def torch_step(torch: Any, net: Any, batch: int, place: str) -> Callable[[], float]:
    """One step of Adam on the ε loss with clipped gradients and an average of the parameters, compiled on a GPU."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, fused=place == "cuda")
    average = [p.detach().clone() for p in net.parameters()]
    net = net.to(memory_format=torch.channels_last)
    call = net if place == "cpu" else torch.compile(net)
    x0 = torch.rand(batch, 3, 32, 32, device=place).to(memory_format=torch.channels_last) * 2 - 1

    def step() -> float:
        t, eps = torch.rand(batch, device=place), torch.randn_like(x0)
        alpha = torch.exp(-0.1 * t - 9.95 * t**2)[:, None, None, None]
        with torch.autocast(place, torch.bfloat16, enabled=place == "cuda"):
            out = call(alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps, 999 * t).sample
            loss = (out - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1e-4)
        return loss.item()  # waits

    return step


def torch_sampler(torch: Any, scheduler: Any, net: Any, batch: int, nfe: int, place: str) -> Callable[[], Any]:
    """Samples by one of diffusers' schedulers, as its pipelines call it; the network is compiled on a GPU."""
    call = net if place == "cpu" else torch.compile(net)

    @torch.no_grad()
    def draw() -> Any:
        scheduler.set_timesteps(nfe)
        x = torch.randn(batch, 3, 32, 32, device=place)
        for t in scheduler.timesteps:
            with torch.autocast(place, torch.bfloat16, enabled=place == "cuda"):
                out = call(x, t.to(place)).sample
            x = scheduler.step(out.float(), t, x).prev_sample
        return float(x.sum())  # waits

    return draw
