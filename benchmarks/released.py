"""The step of VA-π's released code, run from a checkout of it: its own `main`, on random weights and random images.

Nothing of the step is replaced. What is: the files it would read (weights, images) and, for want of a GPU, the names by
which its file reaches one. In one process its FSDP shards nothing; on the CPU it is left out.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import sys
import tempfile
import time
import types
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import peak_gib, reset_peak
from torch import Tensor
from torch.utils.data import DistributedSampler

from varpi.errors import VarpiError

MODELS = {f"llamagen-c2i-{size.lower()}": f"GPT-{size}" for size in ("B", "L", "XL", "XXL")}
TRAINER = "autoregressive.train.train_c2i_grpo"


def check_checkout(path: Path) -> None:
    """Raises VarpiError when `path` is no checkout of the released code."""
    if not (path / "LlamaGen" / Path(*TRAINER.split("."))).with_suffix(".py").is_file():
        raise VarpiError(f"--authors: {path} is no checkout of VA-π's released code (Lil-Shake/VA-Pi)")


def measure_released(options: argparse.Namespace) -> dict[str, Any]:
    """Of the fastest step after the first, which warms up: seconds. Of all after the first: peak GiB."""
    sys.path.insert(0, str(options.authors / "LlamaGen"))
    for name in ("wandb", "requests"):  # imported, not used
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        released: Any = importlib.import_module(TRAINER)
        marks = _stand_in(released, options)
        vq = Path(folder) / "vq.pt"
        torch.save({"model": released.VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8).state_dict()}, vq)
        released.args = _arguments(options, vq)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if options.device == "cpu":
                _without_gpu(released, Path(folder))
            else:
                single = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
                os.environ.update(single)
            released.main(released.args)
    marks.append((time.perf_counter(), time.process_time()))
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(marks[1:])]
    step, processor = min(steps)
    return {"seconds": {"step": step, "processor": processor}, "peak_gib": {"step": peak_gib(options.device)}}


def _arguments(options: argparse.Namespace, vq: Path) -> argparse.Namespace:
    """The settings of the released launcher (its trainer's defaults where it has none), at the benchmark's size."""
    sequences = options.images * options.group_size
    at_once = min(8, sequences)
    return argparse.Namespace(
        gpt_model=MODELS[options.architecture],
        gpt_ckpt=None,
        from_fsdp=False,
        vq_model="VQ-16",
        vq_ckpt=str(vq),
        codebook_size=16384,
        codebook_embed_dim=8,
        image_size=options.image_size,
        downsample_size=16,
        num_classes=1000,
        cls_token_num=1,
        mixed_precision="bf16" if options.dtype == "bfloat16" else "fp32",
        grad_precision=None,
        data_parallel="fsdp",
        lr=1e-6,
        weight_decay=1e-4,
        beta1=0.9,
        beta2=0.999,
        max_grad_norm=1.0,
        epochs=1 + options.repeats,
        global_seed=0,
        num_generations=options.group_size,
        uncond_prob=0.1,
        data_loader="hf",
        data_path="",
        num_workers=0,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        sample_batch_size=options.images,
        train_batch_size=at_once,
        adv_clip_max=5.0,
        clip_range=0.2,
        gradient_accumulation_steps=max(1, sequences // at_once),
        sample_model_mode="train",
        reward_rec_type="l2",
        reward_rec_weight=1.0,
        reward_perceptual_weight=1.0,
        reward_use_gan=False,
        reward_gan_weight=1.0,
        aux_ce_weight=0.1,
        kl_coef=0.01,
        use_kl_loss=False,
        kl_base_ckpt=None,
        use_wandb=False,
        ckpt_every=0,
    )


def _stand_in(released: Any, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Random images and a random VGG16 in place of files; notes the time at the beginning of each step."""
    size, marks = options.image_size, []

    class RandomImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __init__(self, root: str, transform: Any = None) -> None:
            self.images = torch.rand(options.images, 3, size, size) * 2 - 1

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.images[index], torch.tensor(index % 1000)

    class Sampler(DistributedSampler[Any]):
        def set_epoch(self, epoch: int) -> None:  # the first thing that a step does
            super().set_epoch(epoch)
            if epoch == 1:
                reset_peak(options.device)
            marks.append((time.perf_counter(), time.process_time()))

    released.HFImageDataset, released.DistributedSampler = RandomImages, Sampler
    lpips: Any = importlib.import_module("tokenizer.tokenizer_image.lpips")
    models = lpips.models
    lpips.models = _Instead(models, vgg16=lambda pretrained: models.vgg16(weights=None))
    lpips.LPIPS.load_from_pretrained = lambda self: None
    return marks


def _without_gpu(released: Any, folder: Path) -> None:
    """What its file calls torch.cuda, a process group of nccl and FSDP, on the CPU."""

    class Cpu:
        def __rmod__(self, rank: int) -> str:  # rank % device_count() is the device
            return "cpu"

    def nothing(*_: Any) -> None: ...

    amp = types.SimpleNamespace(autocast=lambda dtype: torch.autocast("cpu", dtype))
    names: dict[str, Any] = dict.fromkeys(("set_device", "synchronize", "empty_cache"), nothing)
    cuda = types.SimpleNamespace(is_available=lambda: True, device_count=Cpu, amp=amp, **names)
    released.torch = _Instead(torch, cuda=cuda)

    def join(_: str) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)

    def whole(model: Any, *_: Any) -> Any:
        model.clip_grad_norm_ = partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()))
        return model

    released.dist, released.setup_fsdp_sync = _Instead(dist, init_process_group=join), whole


class _Instead:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
