"""Would the suite notice? Small faults, each planted alone in a copy of the tree, each with tests that must fail then.

    python tests/mutants.py            # all of them, two at a time: about ten minutes
    python tests/mutants.py -j 8 guidance 'optimizer.py'    # those whose file or description holds one of the words

First the named files of tests must pass without a fault. Exits 1 when a fault survives, and when the code that it
replaces is no longer there exactly once; within the suite `test_mutants.py` sees to the latter.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SURVIVED, CAUGHT = 0, 1
"""Exit codes of pytest: all passed, some failed. With any other it did not run the tests."""


class Mutant(NamedTuple):
    fault: str
    file: str
    """Below src/varpi."""
    old: str
    """What stands there exactly once."""
    new: str
    tests: str
    """Arguments of pytest, below tests/."""


MUTANTS = [
    # -- objective
    Mutant(
        "advantages are not clipped",
        "objective/advantages.py",
        "    scaled = scaled.clamp(-clip, clip)\n",
        "",
        "objective/test_advantages.py",
    ),
    Mutant(
        "the deviation of a group is the biased one",
        "objective/advantages.py",
        "exact.std(dim=1, keepdim=True)",
        "exact.std(dim=1, keepdim=True, correction=0)",
        "objective/test_advantages.py",
    ),
    Mutant(
        "advantages compare with the mean of the batch",
        "objective/advantages.py",
        "exact.mean(dim=1, keepdim=True)",
        "exact.mean()",
        "objective/test_advantages.py",
    ),
    Mutant(
        "rounding among equals becomes a signal",
        "objective/advantages.py",
        "spread <= SAME *",
        "spread < 0 *",
        "objective/test_advantages.py",
    ),
    Mutant(
        "advantages are summed in float32",
        "objective/advantages.py",
        "rewards.double()",
        "rewards.float()",
        "objective/test_advantages.py",
    ),
    Mutant(
        "the true token may replace itself",
        "objective/corruption.py",
        "replacement += replacement >= tokens",
        "replacement += replacement > tokens",
        "objective/test_corruption.py",
    ),
    Mutant(
        "context noise of rate 0 replaces where the draw is 0",
        "objective/corruption.py",
        "uniforms[..., 0] < rate",
        "uniforms[..., 0] <= rate",
        "objective/test_corruption.py",
    ),
    Mutant(
        "the released kernel of noise misses a code",
        "objective/corruption.py",
        "choices = vocab_size - 1 if exclude_true else vocab_size",
        "choices = vocab_size - 1",
        "objective/test_corruption.py",
    ),
    Mutant(
        "the policy term takes the better of its two sides",
        "objective/losses.py",
        "torch.maximum(-advantages * ratio",
        "torch.minimum(-advantages * ratio",
        "objective/test_losses.py",
    ),
    Mutant(
        "clip_range is ignored by the loss",
        "objective/losses.py",
        "ratio.clamp(1 - clip_range, 1 + clip_range)",
        "ratio.clamp(0.8, 1.2)",
        "objective/test_losses.py",
    ),
    Mutant(
        "the ratio is clipped from above only",
        "objective/losses.py",
        "ratio.clamp(1 - clip_range, 1 + clip_range)",
        "ratio.clamp(max=1 + clip_range)",
        "objective/test_losses.py",
    ),
    Mutant(
        "old log-probabilities carry a gradient",
        "objective/losses.py",
        "log_ratio = log_probs - old_log_probs.detach()",
        "log_ratio = log_probs - old_log_probs",
        "objective/test_losses.py",
    ),
    Mutant(
        "the estimate of KL is that of the other direction",
        "objective/losses.py",
        "delta = reference_log_probs.detach() - log_probs",
        "delta = log_probs - reference_log_probs.detach()",
        "objective/test_losses.py",
    ),
    Mutant(
        "the gradient of shared logits is a mean over samples",
        "objective/losses.py",
        "-grad_output[rows].sum(dim=1)",
        "-grad_output[rows].mean(dim=1)",
        "objective/test_losses.py",
    ),
    Mutant(
        "slices of a batch leave images out",
        "objective/losses.py",
        "slice(first, first + step)",
        "slice(first, first + 1)",
        "objective/test_losses.py",
    ),
    Mutant(
        "entropy is not divided by the positions",
        "objective/losses.py",
        "total / (logits.shape[0] * logits.shape[1])",
        "total / logits.shape[0]",
        "objective/test_losses.py",
    ),
    Mutant(
        "inversion takes the token at the edge",
        "objective/rollout.py",
        "threshold, right=True",
        "threshold, right=False",
        "objective/test_rollout.py",
    ),
    Mutant(
        "the squared error is a sum",
        "objective/rewards.py",
        'found["mse"] = error.square().mean(dim=(1, 2, 3))',
        'found["mse"] = error.square().sum(dim=(1, 2, 3))',
        "objective/test_rewards.py",
    ),
    Mutant(
        "weights of a reward are ignored",
        "objective/rewards.py",
        "distance = sum(weight * parts[name]",
        "distance = sum(parts[name]",
        "objective/test_rewards.py",
    ),
    Mutant(
        "the absolute error is signed",
        "objective/rewards.py",
        'found["l1"] = error.abs().mean(dim=(1, 2, 3))',
        'found["l1"] = error.mean(dim=(1, 2, 3))',
        "objective/test_rewards.py",
    ),
    Mutant(
        "a pair of samples counts once for an energy score",
        "objective/rewards.py",
        "spread = spread + turned(root, -by)",
        "spread = spread + 0 * root",
        "objective/test_rewards.py",
    ),
    Mutant(
        "the gradient of an energy score counts a pair twice",
        "objective/rewards.py",
        "of_spread=0.5",
        "of_spread=1.0",
        "objective/test_rewards.py",
    ),
    Mutant(
        "a run that only watches keeps the best",
        "training/validation.py",
        "if self._best_by is None:",
        "if self._best_by == 1:",
        "training/test_preview.py -k only_watches",
    ),
    Mutant(
        "held-out images are the first ones",
        "training/validation.py",
        "[i * whole // self._count for i in range(self._count)]",
        "[*range(self._count)]",
        "training/test_preview.py -k some_of_everywhere",
    ),
    Mutant(
        "a chunk decodes one sample and counts as many",
        "objective/rewards.py",
        "yield rows, slice(start, start + chunk)",
        "yield rows, slice(start, start + 1)",
        "objective/test_rewards.py",
    ),
    # -- shapes
    Mutant(
        "held-out pairs are drawn in training",
        "data/scenes.py",
        "        if not every:\n",
        "        if False:\n",
        "data/test_shapes.py -k held_out",
    ),
    Mutant(
        "what is left of something is drawn on its right",
        "data/scenes.py",
        'in ("left of", "above") else',
        'in ("right of", "below") else',
        "data/test_shapes.py -k judged_right",
    ),
    Mutant(
        "a star's box is a circle's",
        "data/rendering.py",
        "lower = lower * np.cos(0.2 * np.pi)",
        "lower = lower * 1.0",
        "data/test_shapes.py -k boxes",
    ),
    Mutant(
        "one shape is found several times",
        "networks/shapes_detector.py",
        "all(_overlap(box, other) <= _OVERLAP for other in kept)",
        "True",
        "networks/test_shapes_detector.py -k overlap",
    ),
    Mutant(
        "cells beside a shape learn that nothing is there",
        "methods/detector.py",
        "shapes[i][near] = -1",
        "shapes[i][near] = 0",
        "methods/test_shapes_detection.py -k cells",
    ),
    Mutant(
        "held-out images are known by their place in the batch",
        "training/validation.py",
        "indices = torch.tensor([*items])",
        "indices = torch.arange(len(items))",
        "methods/test_shapes_detection.py -k resumes",
    ),
    Mutant(
        "a micro-batch knows the whole batch's indices",
        "training/loop.py",
        "indices=batch.indices[i : i + size]",
        "indices=batch.indices",
        "methods/test_token_cache.py -k micro",
    ),
    # -- random streams
    Mutant(
        "all streams of a seed are one",
        "runtime/randomness.py",
        "key=np.array([seed, stream]",
        "key=np.array([seed, 0]",
        "runtime/test_randomness.py",
    ),
    Mutant(
        "the seed is ignored",
        "runtime/randomness.py",
        "key=np.array([seed, stream]",
        "key=np.array([0, stream]",
        "runtime/test_randomness.py",
    ),
    Mutant(
        "every step draws the same",
        "runtime/randomness.py",
        "(step, index, 0), block.size",
        "(0, index, 0), block.size",
        "runtime/test_randomness.py",
    ),
    Mutant(
        "every image draws the same",
        "runtime/randomness.py",
        "(step, index, 0), block.size",
        "(step, 0, 0), block.size",
        "runtime/test_randomness.py",
    ),
    Mutant(
        "neighbouring blocks of words overlap",
        "runtime/randomness.py",
        "np.array([0, *place]",
        "np.array([*place, 0]",
        "runtime/test_randomness.py",
    ),
    Mutant(
        "uniform numbers fill half the interval",
        "runtime/randomness.py",
        "blocks >> np.uint64(40)",
        "blocks >> np.uint64(41)",
        "runtime/test_randomness.py",
    ),
    # -- sampling
    Mutant(
        "sampling draws what a training step drew",
        "sampling/generate.py",
        "stream=Stream.GENERATION",
        "stream=Stream.SAMPLES",
        "sampling/test_generate.py -k stream",
    ),
    Mutant(
        "top-p ends where the sum equals it",
        "sampling/generate.py",
        "cumsum(-1) > sampling.top_p",
        "cumsum(-1) >= sampling.top_p",
        "sampling/test_generate.py -k top_p",
    ),
    Mutant(
        "top-p leaves the token that crosses it out",
        "sampling/generate.py",
        "torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)",
        "torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., 1:]], dim=-1)",
        "sampling/test_generate.py -k filters",
    ),
    Mutant(
        "top-k leaves out those that equal the last",
        "sampling/generate.py",
        "logits < least",
        "logits <= least",
        "sampling/test_generate.py -k filters",
    ),
    Mutant(
        "the temperature is ignored",
        "sampling/generate.py",
        "logits.float() / sampling.temperature",
        "logits.float()",
        "sampling/test_generate.py -k filters",
    ),
    Mutant(
        "guidance starts from the conditional logits",
        "sampling/generate.py",
        "logits = null + scale * (conditional - null)",
        "logits = conditional + scale * (conditional - null)",
        "sampling/test_generate.py -k greedy",
    ),
    Mutant(
        "the unconditional half ends a step early",
        "sampling/generate.py",
        "position > guided_to",
        "position >= guided_to",
        "sampling/test_generate.py -k half",
    ),
    Mutant(
        "a recorded step is replayed on its first tokens",
        "sampling/graph.py",
        "        self.tokens.copy_(tokens)\n",
        "",
        "sampling/test_generate.py -k recorded",
    ),
    Mutant(
        "packed weights outlive the context",
        "sampling/packing.py",
        'vars(layer).pop("forward", None)',
        "pass",
        "sampling/test_packing.py",
    ),
    Mutant(
        "a query sees what is not written yet",
        "generators/llamagen.py",
        "    scores[..., end:] = -torch.inf\n",
        "",
        "generators/test_llamagen.py -k one_query",
    ),
    Mutant(
        "copies of a part round at random apart",
        "training/sharding.py",
        'world.rank if over == "all" else world.rank % world.per_node',
        "world.rank",
        "training/test_processes.py -k alike",
    ),
    Mutant(
        "copies on other nodes hear of the first micro-batch alone",
        "training/loop.py",
        "i == len(micro_batches) - 1)",
        "i == 0)",
        "training/test_processes.py -k two_nodes",
    ),
    Mutant(
        "a cache that grows forgets",
        "generators/llamagen.py",
        "F.pad(part, (0, 0, 0, more))",
        "F.pad(part * 0, (0, 0, 0, more))",
        "sampling/test_generate.py -k teacher_forcing",
    ),
    Mutant(
        "the rotation that is compiled turns the other way",
        "generators/llamagen.py",
        "[even * cos - odd * sin, odd * cos + even * sin]",
        "[even * cos + odd * sin, odd * cos - even * sin]",
        "generators/test_llamagen.py -k rotation",
    ),
    Mutant(
        "a folded kernel's even and odd rows change places",
        "tokenizers/vq.py",
        "for sizes in (even, odd)]\n        kernels",
        "for sizes in (odd, even)]\n        kernels",
        "tokenizers/test_vq.py -k folded",
    ),
    Mutant(
        "the samples of an image depend on the batch",
        "sampling/generate.py",
        "size, number = len(part), first + start",
        "size, number = len(part), first",
        "sampling/test_generate.py -k seed",
    ),
    Mutant(
        "samples are drawn with dropout",
        "sampling/generate.py",
        "    generator.eval()\n    try:",
        "    try:",
        "sampling/test_generate.py -k dropout",
    ),
    Mutant(
        "the guidance interval is one step short",
        "sampling/settings.py",
        "0 <= self.guidance_interval < i",
        "0 <= self.guidance_interval <= i",
        "sampling/test_settings.py",
    ),
    Mutant(
        "power-cosine guidance reaches twice the scale",
        "sampling/settings.py",
        "(1 - turn) / 2",
        "(1 - turn)",
        "sampling/test_settings.py",
    ),
    # -- evaluation
    Mutant(
        "a ball of precision has no surface",
        "evaluation/distances.py",
        "distances <= real_radii",
        "distances < real_radii",
        "evaluation/test_distances.py -k surface",
    ),
    Mutant(
        "a ball of recall has no surface",
        "evaluation/distances.py",
        "distances <= radii[:, None]",
        "distances < radii[:, None]",
        "evaluation/test_distances.py -k surface",
    ),
    Mutant(
        "a vector is its own nearest neighbour",
        "evaluation/distances.py",
        "points).topk(k + 1,",
        "points).topk(k,",
        "evaluation/test_distances.py -k precision",
    ),
    Mutant(
        "the kernel's degree is two",
        "evaluation/distances.py",
        "/ x.shape[1] + 1) ** 3",
        "/ x.shape[1] + 1) ** 2",
        "evaluation/test_distances.py -k kernel",
    ),
    Mutant(
        "the kernel distance counts a vector with itself",
        "evaluation/distances.py",
        "kernel.sum() - kernel.trace()",
        "kernel.sum()",
        "evaluation/test_distances.py -k kernel",
    ),
    Mutant(
        "the Inception Score of the whole, whatever the splits",
        "evaluation/distances.py",
        "np.array_split(values, splits)",
        "np.array_split(values, 1)",
        "evaluation/test_distances.py -k inception",
    ),
    Mutant(
        "the covariance is the biased one",
        "evaluation/statistics.py",
        "values.T @ values / max(len(values) - 1, 1)",
        "values.T @ values / len(values)",
        "evaluation/test_statistics.py",
    ),
    Mutant(
        "merged means lean to the wrong side",
        "evaluation/statistics.py",
        "a.mean + shift * (b.count / total)",
        "a.mean + shift * (a.count / total)",
        "evaluation/test_statistics.py",
    ),
    Mutant(
        "merging forgets how far apart the means are",
        "evaluation/statistics.py",
        "    scatter += np.outer(shift, shift) * (a.count * b.count / total)\n",
        "",
        "evaluation/test_statistics.py",
    ),
    Mutant(
        "the Fréchet distance without the means",
        "evaluation/statistics.py",
        "distance = difference @ difference + ",
        "distance = ",
        "evaluation/test_distances.py -k frechet",
    ),
    Mutant(
        "half of the trace of the root",
        "evaluation/statistics.py",
        "- 2 * trace_of_root",
        "- trace_of_root",
        "evaluation/test_distances.py -k frechet",
    ),
    # -- images
    Mutant(
        "an image of twice the size is not halved",
        "data/transforms.py",
        "min(image.size) >= 2 * size",
        "min(image.size) > 2 * size",
        "data/test_transforms.py -k crop",
    ),
    Mutant(
        "halving is bicubic",
        "data/transforms.py",
        "Image.Resampling.BOX",
        "Image.Resampling.BICUBIC",
        "data/test_transforms.py -k crop",
    ),
    Mutant(
        "a scaled side is cut, not rounded",
        "data/transforms.py",
        "(round(image.width * scale), round(image.height * scale))",
        "(int(image.width * scale), int(image.height * scale))",
        "data/test_transforms.py -k crop",
    ),
    Mutant(
        "images lie in [0, 1]",
        "data/transforms.py",
        "/ 255 * 2 - 1",
        "/ 255",
        "data/test_transforms.py -k tensor",
    ),
    Mutant(
        "pixels are quantized half a step lower",
        "data/pixels.py",
        "+ 128.0",
        "+ 127.5",
        "samples/test_images.py",
    ),
    Mutant(
        "transparent is black",
        "data/images.py",
        'image.size, "white")',
        'image.size, "black")',
        "data/test_decoding.py -k alpha",
    ),
    Mutant(
        "of 16 bits the low byte is taken",
        "data/images.py",
        "(wide >> 8)",
        "(wide & 255)",
        "data/test_decoding.py -k sixteen",
    ),
    Mutant(
        "orientation is ignored",
        "data/images.py",
        "ImageOps.exif_transpose(image) if turned else image",
        "image",
        "data/test_decoding.py -k orientation",
    ),
    Mutant(
        "the limit of pixels is ignored",
        "data/images.py",
        "width * height > max_pixels",
        "width * height > max_pixels**2",
        "data/test_decoding.py -k pixels",
    ),
    # -- captions
    Mutant(
        "caption features are padded on the right",
        "generators/llamagen.py",
        "F.pad(feature.float(), (0, 0, length - len(feature), 0))",
        "F.pad(feature.float(), (0, 0, 0, length - len(feature)))",
        "generators/test_llamagen.py -k padded",
    ),
    Mutant(
        "the mask of captions shows the padding",
        "generators/llamagen.py",
        ">= length - valid[:, None]",
        "< valid[:, None]",
        "generators/test_llamagen.py -k padded",
    ),
    Mutant(
        "captions are cleaned once",
        "data/text_encoder.py",
        "clean_caption(clean_caption(caption))",
        "clean_caption(caption)",
        "data/test_text_encoder.py -k cleaned",
    ),
    Mutant(
        "alignment numbers classes in the data's own order",
        "cli/evaluate.py",
        "named = pair.class_names if",
        "named = None if",
        "cli/test_evaluate.py -k numbers_classes",
    ),
    Mutant(
        "captions that cleaning empties are trained on",
        "data/caption_check.py",
        "if not clean_caption(clean_caption(caption)):",
        "if not caption:",
        "data/test_caption_check.py -k cleaning",
    ),
    Mutant(
        "a caption may fill the room of an image's first token",
        "generators/language_model.py",
        "if length > self.room:\n            message",
        "if length > self.room + 1:\n            message",
        "generators/test_janus.py -k check_of",
    ),
    Mutant(
        "T5 attends to its padding",
        "data/text_encoder.py",
        ", attention_mask=mask).last_hidden_state",
        ").last_hidden_state",
        "data/test_text_encoder.py -k company",
    ),
    # -- networks
    Mutant(
        "maps are compared without unit length",
        "networks/perceptual.py",
        "_unit(maps).unflatten(0, (count, -1)), _unit(reference).unsqueeze(1)",
        "maps.float().unflatten(0, (count, -1)).clone(), reference.float().unsqueeze(1)",
        "networks/test_perceptual.py",
    ),
    Mutant(
        "LPIPS without its learned weights",
        "networks/perceptual.py",
        "_unit_difference(a, b) * weight.float()",
        "_unit_difference(a, b)",
        "networks/test_perceptual.py",
    ),
    Mutant(
        "LPIPS without its scaling of colours",
        "networks/perceptual.py",
        "self.trunk(self.scaling_layer(images)",
        "self.trunk((images)",
        "networks/test_perceptual.py",
    ),
    # -- tokenizer and generator
    Mutant(
        "a norm's epsilon is PyTorch's",
        "tokenizers/vq.py",
        "self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)",
        "self.norm2 = nn.GroupNorm(groups, cout)",
        "tokenizers/test_vq.py -k norms",
    ),
    Mutant(
        "down-sampling pads the other side",
        "tokenizers/vq.py",
        "F.pad(x, (0, 1, 0, 1))",
        "F.pad(x, (1, 0, 1, 0))",
        "tokenizers/test_vq.py -k vq8",
    ),
    Mutant(
        "codes keep their lengths",
        "tokenizers/vq.py",
        "return F.normalize(self.embedding.weight.float(), dim=-1)",
        "return self.embedding.weight.float()",
        "tokenizers/test_vq.py -k vq8",
    ),
    Mutant(
        "no gradient passes the quantization",
        "tokenizers/vq.py",
        "self.decode_codes(latents + (codes - latents).detach())",
        "self.decode_codes(codes)",
        "tokenizers/test_vq.py -k gradient",
    ),
    Mutant(
        "the rotary table turns condition positions",
        "generators/llamagen.py",
        "table.new_zeros(config.condition_tokens",
        "table.new_ones(config.condition_tokens",
        "generators/test_llamagen.py -k class_logits",
    ),
    Mutant(
        "rows and columns of the rotary table change places",
        "generators/llamagen.py",
        "torch.cat([rows, columns], dim=-1)",
        "torch.cat([columns, rows], dim=-1)",
        "generators/test_llamagen.py -k class_logits",
    ),
    Mutant(
        "odd coordinates turn the other way",
        "generators/llamagen.py",
        "odd * cos + even * sin",
        "odd * cos - even * sin",
        "generators/test_llamagen.py -k class_logits",
    ),
    Mutant(
        "padded captions are attended to",
        "generators/llamagen.py",
        "        mask[:, :, : self.condition_tokens] &= condition.mask.bool()[:, None, :]\n",
        "",
        "generators/test_llamagen.py -k text_logits",
    ),
    Mutant(
        "the null class is the last real one",
        "generators/llamagen.py",
        "condition.masked_fill(drop, self.config.num_classes)",
        "condition.masked_fill(drop, self.config.num_classes - 1)",
        "generators/test_llamagen.py -k greedy",
    ),
    Mutant(
        "captions pass an exact GELU",
        "generators/llamagen.py",
        'approximate="tanh"',
        'approximate="none"',
        "generators/test_llamagen.py -k text_logits",
    ),
    Mutant(
        "gate and up change places in files",
        "generators/llamagen_files.py",
        '"layers.{i}.feed_forward.w1.weight": "blocks.{i}.feed_forward.gate.weight",\n'
        '    "layers.{i}.feed_forward.w3.weight": "blocks.{i}.feed_forward.up.weight",',
        '"layers.{i}.feed_forward.w3.weight": "blocks.{i}.feed_forward.gate.weight",\n'
        '    "layers.{i}.feed_forward.w1.weight": "blocks.{i}.feed_forward.up.weight",',
        "generators/test_llamagen.py -k class_logits",
    ),
    # -- methods and training
    Mutant(
        "the clip of advantages in a recipe is ignored",
        "methods/va_pi.py",
        "clip = self.settings.advantage_clip",
        "clip = 5.0",
        "methods/test_va_pi.py -k clips",
    ),
    Mutant(
        "the clip range in a recipe is ignored",
        "methods/va_pi.py",
        "rollout.advantages, clip_range=settings.clip_range",
        "rollout.advantages",
        "methods/test_va_pi.py -k clips",
    ),
    Mutant(
        "noise and samples share a stream",
        "methods/va_pi.py",
        "Stream.CONTEXT_NOISE",
        "Stream.SAMPLES",
        "methods/test_va_pi.py -k every_draw",
    ),
    Mutant(
        "the noisy context is of the released kernel",
        "methods/va_pi.py",
        "exclude_true=not self.settings.compat.uniform_noise",
        "exclude_true=self.settings.compat.uniform_noise",
        "methods/test_va_pi.py -k released_noise",
    ),
    Mutant(
        "the policy's pass is always in train mode",
        "methods/va_pi.py",
        'self.model.train(self.settings.policy_mode == "train")',
        "self.model.train()",
        "methods/test_va_pi.py -k original",
    ),
    Mutant(
        "the prior's weight is ignored",
        "methods/va_pi.py",
        "loss = loss + settings.prior_weight * prior",
        "loss = loss + prior",
        "methods/test_va_pi.py -k original",
    ),
    Mutant(
        "later updates forget what drew the samples",
        "methods/va_pi.py",
        "if rollout.old_log_probs is None:",
        "if True:",
        "methods/test_va_pi.py -k later_updates",
    ),
    Mutant(
        "validation with dropout",
        "methods/teacher_forcing.py",
        "        self.model.eval()\n        targets",
        "        targets",
        "methods/test_va_pi.py -k validation_has",
    ),
    Mutant(
        "conditions are never dropped",
        "methods/teacher_forcing.py",
        "< self.settings.condition_drop",
        "< 0",
        "methods/test_va_pi.py -k stream",
    ),
    Mutant(
        "the reference keeps its dropout",
        "methods/teacher_forcing.py",
        "frozen.requires_grad_(False).eval()",
        "frozen.requires_grad_(False).train()",
        "methods/test_va_pi.py -k reference_has",
    ),
    Mutant(
        "the start keeps its adapters",
        "methods/teacher_forcing.py",
        "        with without_adapters(self.model):\n            logits",
        "        with torch.no_grad():\n            logits",
        "methods/test_va_pi_beyond.py -k with_adapters",
    ),
    Mutant(
        "a sample's own gradient is its control variate",
        "objective/first_order.py",
        "others = (products.sum(dim=1, keepdim=True) - products) / (group_size - 1)",
        "others = products.mean(dim=1, keepdim=True).expand_as(products)",
        "objective/test_first_order.py -k unbiased",
    ),
    Mutant(
        "the two estimators are of different scale",
        "methods/va_pi.py",
        "linear / logits.shape[1] if",
        "linear if",
        "methods/test_va_pi_beyond.py -k both_estimators",
    ),
    Mutant(
        "AR-GRPO's rollouts are not guided",
        "methods/ar_grpo.py",
        "Sampling(guidance_scale=settings.guidance_scale)",
        "Sampling()",
        "methods/test_ar_grpo.py -k plain_graph",
    ),
    Mutant(
        "AR-GRPO divides by the bare deviation",
        "methods/ar_grpo.py",
        "clip=math.inf, eps=1e-4",
        "clip=math.inf",
        "methods/test_ar_grpo.py -k plain_graph",
    ),
    Mutant(
        "the judge may reward",
        "methods/image_rewards.py",
        "if any(_same(network, judge) for judge in _judges(device)):",
        "if False:",
        "methods/test_image_rewards.py -k judge",
    ),
    Mutant(
        "a reward may be NaN",
        "methods/image_rewards.py",
        "if bad := int((~rewards.isfinite()).sum()):",
        "if bad := 0:",
        "methods/test_image_rewards.py -k no_reward",
    ),
    Mutant(
        "the decoder's samples see no context noise",
        "methods/tokenizer_decoder.py",
        "self.logits(self.generator, context, batch.condition)",
        "self.logits(self.generator, targets, batch.condition)",
        "methods/test_tokenizer_decoder.py -k plain_graph",
    ),
    Mutant(
        "the codes' convolution stays as it was",
        "methods/tokenizer_decoder.py",
        "for part in (tokenizer.post_quant_conv, tokenizer.decoder):",
        "for part in (tokenizer.decoder,):",
        "methods/test_tokenizer_decoder.py -k resumes",
    ),
    Mutant(
        "the learning rate never reaches the optimizer",
        "training/loop.py",
        '            group["lr"] = rate\n',
        "            pass\n",
        "training/test_optimizer.py",
    ),
    Mutant(
        "betas are ignored",
        "training/optimizer.py",
        ', "betas": settings.betas',
        "",
        "training/test_optimizer.py",
    ),
    Mutant(
        "the optimizer's epsilon is ignored",
        "training/optimizer.py",
        ', "eps": settings.eps}',
        "}",
        "training/test_optimizer.py",
    ),
    Mutant(
        "weight decay is ignored",
        "training/optimizer.py",
        '"weight_decay": settings.weight_decay',
        '"weight_decay": 0.01',
        "training/test_optimizer.py",
    ),
    Mutant(
        "norms are decayed",
        "training/optimizer.py",
        '"weight_decay": 0.0},',
        '"weight_decay": settings.weight_decay},',
        "training/test_optimizer.py",
    ),
    Mutant(
        "warm-up begins one step early",
        "training/optimizer.py",
        "(step + 1) / max(1, settings.warmup_steps)",
        "(step + 2) / max(1, settings.warmup_steps)",
        "training/test_optimizer.py -k learning_rate",
    ),
    Mutant(
        "the cosine counts the warm-up",
        "training/optimizer.py",
        "done = (step - settings.warmup_steps)",
        "done = step",
        "training/test_optimizer.py -k learning_rate",
    ),
    Mutant(
        "gradients are not clipped",
        "training/loop.py",
        "gradient_norm(self.parameters, self.recipe.optimizer.gradient_clip)",
        'gradient_norm(self.parameters, float("inf"))',
        "training/test_optimizer.py",
    ),
    Mutant(
        "dropout is the same in every step",
        "training/loop.py",
        "{self.recipe.seed} {step} {self.world.rank} {micro_batch}",
        "{self.recipe.seed} {self.world.rank} {micro_batch}",
        "training/test_optimizer.py -k dropout",
    ),
    Mutant(
        "dropout is the same in every process",
        "training/loop.py",
        "{self.recipe.seed} {step} {self.world.rank} {micro_batch}",
        "{self.recipe.seed} {step} {micro_batch}",
        "training/test_optimizer.py -k dropout",
    ),
    Mutant(
        "micro-batches weigh alike whatever their size",
        "training/loop.py",
        "share = len(micro.images) / len(batch.images)",
        "share = 1 / len(micro_batches)",
        "training/test_loop.py -k accumulation",
    ),
    Mutant(
        "a poisoned update is made",
        "training/loop.py",
        'if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):',
        'if math.isfinite(metrics["learning_rate"]):',
        "training/test_optimizer.py -k skipped",
    ),
    Mutant(
        "gradients are summed in bfloat16",
        "training/sharding.py",
        "reduce_dtype=torch.float32",
        "reduce_dtype=torch.bfloat16",
        "training/test_processes.py -k losses_of_one",
    ),
    Mutant(
        "every batch of validation weighs alike",
        "training/validation.py",
        "images += len(items)",
        "images += 1",
        "training/test_trouble.py -k weighs",
    ),
    Mutant(
        "a held-out reward is summed where a loss is",
        "training/validation.py",
        "reward + reward_of_batch * len(items)",
        "reward + of_batch * len(items)",
        "training/test_preview.py -k notice",
    ),
    Mutant(
        "the average takes the decay for its complement",
        "training/average.py",
        "local(parameter), 1 - self._decay)",
        "local(parameter), self._decay)",
        "training/test_average.py -k by_hand",
    ),
    Mutant(
        "the held-out reward is drawn by place in the batch",
        "methods/va_pi.py",
        "self.seed, 0, batch.indices, (targets",
        "self.seed, 0, batch.positions, (targets",
        "training/test_preview.py -k by_hand",
    ),
    Mutant(
        "the best by reward is the least",
        "training/validation.py",
        'else -found["reward"]',
        'else found["reward"]',
        "training/test_preview.py -k best_weights",
    ),
    Mutant(
        "an average takes no memory",
        "cli/needs.py",
        "count * (STATE + average)",
        "count * STATE",
        "cli/test_doctor.py -k memory",
    ),
    Mutant(
        "a checkpoint in the background is of the weights as they change",
        "training/state.py",
        "held if self._thread is None else _copied(held)",
        "held",
        "training/test_resume.py -k test_training_goes_on_while",
    ),
    Mutant(
        "a run ends before its checkpoint is written",
        "training/loop.py",
        ", closing(writer):",
        ":",
        "training/test_trouble.py -k test_an_error_leaves_time",
    ),
    # -- studies
    Mutant(
        "the spread over training seeds is the biased one",
        "studies/summary.py",
        "statistics.stdev(by_training)",
        "statistics.pstdev(by_training)",
        "studies/test_summary.py",
    ),
    Mutant(
        "differences are not of one training seed",
        "studies/summary.py",
        "_of(other, seed), strict",
        "_of(other, [*other][0]), strict",
        "studies/test_summary.py",
    ),
    Mutant(
        "a lead within the spread wins",
        "studies/summary.py",
        'abs(difference["mean"]) > max(spread, difference["sampling_spread"] or 0.0)',
        'abs(difference["mean"]) > 0',
        "studies/test_summary.py",
    ),
    Mutant(
        "what sampling seeds do to an untrained row makes a winner",
        "studies/summary.py",
        'max(spread, difference["sampling_spread"] or 0.0)',
        "spread",
        "studies/test_summary.py",
    ),
    Mutant(
        "a missing image's cached tokens are trained on",
        "methods/next_token.py",
        "if tokens.min() < 0:",
        "if False:",
        "methods/test_token_cache.py",
    ),
    Mutant(
        "caption features of another split are taken",
        "data/caption_features.py",
        "return None if other in (None, split) else str(other)",
        "return None",
        "data/test_caption_features.py -k split",
    ),
    Mutant(
        "settings are chosen on the test split",
        "studies/study.py",
        'choice.sampling_seed, choice.split)["metrics"]',
        'choice.sampling_seed, self.study.protocol.split)["metrics"]',
        "studies/test_study.py -k chosen_is_chosen",
    ),
    Mutant(
        "what a variant begins with costs nothing",
        "studies/study.py",
        "value + before.get(key, 0)",
        "value",
        "studies/test_study.py -k costs_and_begins",
    ),
    Mutant(
        "the result of another study is taken",
        "studies/work.py",
        "difference(before, now) or difference(now, before)",
        "None",
        "studies/test_study.py -k done_once",
    ),
    Mutant(
        "variants may differ in what they do not say",
        "studies/plan.py",
        "if flat[name][key] != flat[first][key]:",
        "if False:",
        "studies/test_study.py -k variants_that_are_refused",
    ),
    # -- the playground
    Mutant(
        "a row is shown before it is drawn",
        "play/frames.py",
        "frame[:, rows * pair.tokenizer.downsample :] = 0",
        "frame[:, (rows + 1) * pair.tokenizer.downsample :] = 0",
        "play/test_frames.py -k blank",
    ),
    Mutant(
        "a slow decoder holds up the drawing",
        "play/frames.py",
        "row == grid or decoding <= drawing",
        "row == grid or decoding >= 0",
        "play/test_frames.py -k slow",
    ),
    Mutant(
        "the step on a picture has draws of its own",
        "play/picture_step.py",
        "stream=Stream.SAMPLES",
        "stream=Stream.REPORT_SAMPLES",
        "play/test_picture_step.py -k advantages",
    ),
    Mutant(
        "what a token did well is coloured as bad",
        "play/showing.py",
        "values[..., None] > 0",
        "values[..., None] < 0",
        "play/test_showing.py -k credit",
    ),
    Mutant(
        "a visitor reads any file that looks like a study",
        "play/app.py",
        "if Path(path) not in find_studies(places):",
        "if not Path(path).exists():",
        "play/test_app.py -k study",
    ),
    Mutant(
        "an upload that is refused stays on the disk",
        "play/app.py",
        "            place.unlink(missing_ok=True)",
        "            pass",
        "play/test_app.py -k deleted",
    ),
    Mutant(
        "a study's verdict takes a loss for a gain",
        "studies/findings.py",
        '(mean < 0) == (better == "lower")',
        '(mean > 0) == (better == "lower")',
        "play/test_showing.py -k study",
    ),
]


class Tree:
    """A copy of src/, benchmarks/ and tests/ in which tests run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("src", "benchmarks", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def test(self, *arguments: str) -> tuple[int, str]:
        """The exit code of pytest, and what it printed."""
        # No bytecode: a fault of the same length, planted within the same second, would not be seen beside it.
        environment = os.environ | {"PYTHONPATH": str(self.folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
            cwd=self.folder / "tests",
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def test_with(self, mutant: Mutant) -> tuple[int, str]:
        path = self.folder / "src" / "varpi" / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(planted(mutant, text), encoding="utf-8")
        try:
            return self.test(*mutant.tests.split())
        finally:
            path.write_text(text, encoding="utf-8")


def planted(mutant: Mutant, text: str) -> str:
    """The text of a file with the fault in it; ValueError when there is not exactly one place for it."""
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.old!r} {count} times: say where {mutant.fault!r} belongs now")
    return text.replace(mutant.old, mutant.new)


def carry_out(mutants: list[Mutant], jobs: int, folder: Path) -> int:
    """Print what became of each; how many were not caught."""
    trees: SimpleQueue[Tree] = SimpleQueue()
    for number in range(jobs):
        trees.put(Tree(folder / str(number)))
    wrong = 0

    def run(mutant: Mutant) -> tuple[int, str, float]:
        tree, begun = trees.get(), time.monotonic()
        try:
            return *tree.test_with(mutant), time.monotonic() - begun
        finally:
            trees.put(tree)

    files = sorted({mutant.tests.partition(" ")[0] for mutant in mutants})
    code, output = Tree(folder / "whole").test(*files)
    if code != SURVIVED:
        print(f"{output}\nwithout any fault these tests must pass")
        return 1
    print(f"the tests of {len(files)} files pass without a fault", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, (code, output, seconds) in zip(mutants, pool.map(run, mutants), strict=True):
            said = {SURVIVED: "SURVIVED", CAUGHT: "caught"}.get(code, "NOT TESTED")
            print(f"{said:10s} {seconds:4.0f} s  {mutant.file}: {mutant.fault}", flush=True)
            if code != CAUGHT:
                wrong += 1
                print(output if code != SURVIVED else f"{'':18s} by {mutant.tests}", flush=True)
    print(f"{len(mutants) - wrong} of {len(mutants)} caught")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose file or description holds one of these")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="at a time (default: %(default)s)")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(word in f"{m.file} {m.fault}" for word in options.words)]
    with tempfile.TemporaryDirectory(prefix="varpi-mutants-") as folder:
        return min(1, carry_out(chosen, options.jobs, Path(folder)))


if __name__ == "__main__":
    raise SystemExit(main())
