"""`varpi train --dry-run`: its memory against what tensors weigh and what a run takes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from varpi.cli.main import main
from varpi.errors import VarpiError
from varpi.recipe import load_recipe, method_names
from varpi.runtime.ledger import Ledger
from varpi.training.reckoning import PROCESS_OVERHEAD, Rates, StageWork, reckon, room_of, what_fits

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def weights(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_a_ledger_knows_what_lives_at_once() -> None:
    with Ledger() as ledger:
        one = torch.zeros(1000)
        with ledger.stage("work"):
            product = torch.zeros(10, 100) @ torch.zeros(100, 20)  # 4000 + 8000 bytes in, 800 out
            view = product[:5]
        del product
        assert ledger.live == 4000 + 800  # the view holds it
        del view, one
    stage = ledger.stages["work"]
    assert (ledger.peak, stage.top, stage.added, stage.kept) == (16800, 16800, 12800, 800)
    assert stage.flops == {torch.float32: 2 * 10 * 100 * 20}
    assert ledger.live == 0


def test_what_stays_is_what_the_tensors_weigh(pair: Path) -> None:
    found = reckon(tiny.recipe(pair, "method.prior=kl", "training.micro_batch=4"))
    trained = weights(tiny.generator())
    assert found.standing["trained weights"] == found.standing["gradients"] == trained
    assert found.standing["reference copy"] == trained
    assert found.standing["tokenizer"] == weights(tiny.tokenizer())
    assert found.standing["images of a batch"] == 8 * 3 * tiny.IMAGE_SIZE**2 * 4
    steps = 4 * len([*tiny.generator().parameters()])  # a counter beside each two moments
    assert found.standing["optimizer state"] == 2 * trained + steps
    halved = reckon(tiny.recipe(pair, "optimizer.state_precision=bf16"))
    assert halved.standing["optimizer state"] == trained + steps
    standing, working = sum(found.standing.values()), sum(found.working.values())
    assert found.peak == standing + working
    on_card = reckon(tiny.recipe(pair, "method.prior=kl", "training.micro_batch=4"), cuda=True)
    assert standing < on_card.peak < standing + working  # where stages share what memory is free


def test_the_work_of_a_step_is_what_its_modules_count(pair: Path) -> None:
    found = reckon(tiny.recipe(pair))
    tokens, condition = torch.zeros(8, 16, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        tiny.generator().logits(tokens, condition)
    with FlopCounterMode(display=False) as decode, torch.no_grad():
        for _ in range(4):  # G
            tiny.tokenizer().decode(tokens)
    assert found.work["transformer"].flops == {torch.float32: forward.get_total_flops()}
    assert found.work["reward"].flops == {torch.float32: decode.get_total_flops()}
    assert sum(found.work["backward"].flops.values()) == pytest.approx(2 * forward.get_total_flops(), rel=0.1)
    parts = reckon(tiny.recipe(pair, "training.micro_batch=2"))  # two of four are run
    assert parts.tflop == pytest.approx(found.tflop, rel=0.02)


def test_settings_that_save_memory_save_it(pair: Path) -> None:
    plain = reckon(tiny.recipe(pair))
    assert reckon(tiny.recipe(pair, "training.gradient_checkpointing=true")).activations < 0.6 * plain.activations
    assert reckon(tiny.recipe(pair, "training.micro_batch=4")).activations == pytest.approx(
        plain.activations / 2, rel=0.1
    )
    smaller = reckon(tiny.recipe(pair, "method.reward.decode_batch=4"))
    assert smaller.working["reward"] < 0.5 * plain.working["reward"]


def test_copies_of_the_weights_are_counted(pair: Path) -> None:
    plain = reckon(tiny.recipe(pair))
    averaged = reckon(tiny.recipe(pair, "training.ema=0.9"))
    assert averaged.standing["average of the weights"] == plain.standing["trained weights"]
    held = reckon(tiny.recipe(pair, "training.ema=0.9", "training.save_in_background=true"))
    moments = held.standing["optimizer state"]
    assert moments == pytest.approx(2 * plain.standing["trained weights"], rel=1e-3)
    assert held.working["checkpoint"] == 2 * plain.standing["trained weights"] + moments
    assert held.peak - averaged.peak == held.working["checkpoint"]
    on_a_card = reckon(tiny.recipe(pair, "training.save_in_background=true"), cuda=True)
    assert on_a_card.peak == reckon(tiny.recipe(pair), cuda=True).peak


def test_seconds_are_products_and_then_traffic(pair: Path) -> None:
    rates = Rates({torch.float32: 10.0, torch.bfloat16: 20.0}, 4.0)
    found = reckon(tiny.recipe(pair))
    object.__setattr__(
        found, "work", {"a": StageWork({torch.float32: 30, torch.bfloat16: 20}, 6), "b": StageWork({}, 2)}
    )
    assert found.seconds(rates) == 3 + 1 + 2


@pytest.mark.parametrize("name", ["digits-best", "digits-tokenizer-decoder", "digits-tokenizer", "cifar10-classifier"])
def test_shipped_recipes_of_all_kinds(name: str) -> None:
    found = reckon(load_recipe(name))
    assert found.peak > sum(found.standing.values()) > 0
    assert found.tflop > 0


def test_a_card_does_not_keep_what_a_cpu_keeps(pair: Path) -> None:
    """Attention in bf16 keeps its scores on a CPU alone."""
    recipe = tiny.recipe(pair, "training.precision=bf16", "training.batch_size=2")
    here, there = (reckon(recipe, cuda=cuda).activations for cuda in (False, True))
    assert here > there


@pytest.mark.slow
def test_the_xxl_recipe_is_the_reckoning_of_the_docs() -> None:
    """docs/gpu_queue.md counts 1377.6 TFLOP by hand, with up-sampling apart from its convolution: bf16 folds it in."""
    recipe = load_recipe("llamagen-c2i-xxl", ["method.reward.precision=fp32"])
    assert reckon(recipe).tflop == pytest.approx(1377.6, rel=2e-3)
    assert reckon(load_recipe("llamagen-c2i-xxl")).tflop < 1340


@pytest.mark.slow
def test_janus_by_its_name() -> None:
    pytest.importorskip("transformers")
    names = [f"{part}.{key}" for part in ("generator", "tokenizer") for key in ("architecture=janus-pro-1b",)]
    found = reckon(load_recipe("janus-pro-1b", [*names, "lora.rank=4"]))
    assert found.standing["frozen weights"] == pytest.approx(4.1 * 2**30, rel=0.1)  # docs/gpu_queue.md; 2 bytes each


def test_what_cannot_be_reckoned_says_so(pair: Path) -> None:
    assert "ar_grpo" in method_names()
    with pytest.raises(VarpiError, match="cannot reckon method ar_grpo"):
        reckon(tiny.recipe(pair, method="ar_grpo"))
    with pytest.raises(VarpiError, match="cannot reckon method ar_grpo"):
        reckon(load_recipe("digits-ar-grpo"))
    with pytest.raises(VarpiError, match=r"nowhere\.pt: is not here; name its generator\.architecture"):
        reckon(tiny.recipe(pair, "generator.source=nowhere.pt"))


def test_what_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    memory = 1.2  # of which 0.14 are left for tensors, and digits needs 0.26
    assert main(["train", "digits", "--dry-run", "--device-memory", str(memory), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    room = room_of("cpu", memory)
    settings = what_fits(load_recipe("digits"), room)
    assert settings
    assert " ".join(f"--set {setting}" for setting in settings) in said
    assert "does not fit" in said
    assert reckon(load_recipe("digits"), cuda=True).peak > room.tensors
    assert reckon(load_recipe("digits", settings), cuda=True).peak <= room.tensors
    given = ["train", "digits-tokenizer", "--dry-run", "--device-memory", "1.06", "--device", "cpu"]
    assert main(given) == 2  # 7 MiB are left: less than its weights, gradients and moments
    assert "no setting that varpi knows makes it fit" in capsys.readouterr().err


def test_it_says_parts_and_time(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varpi.training.dry_run.measure_rates", lambda *_: Rates({torch.float32: 1e9}, 1e9))
    assert main(["train", str(pair / "va_pi.yaml"), "--dry-run", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for words in ("trained weights", "optimizer state", "with gradient_checkpointing", "s a step"):
        assert words in said
    assert "at the peak (all of it, for freed memory is kept)" in said
    assert not Path("runs").exists() or not (Path("runs") / "va_pi").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device-memory", "24"], "--device-memory is for --dry-run"),
        (["--dry-run", "--device-memory", "0"], "not a size of memory"),
    ],
)
def test_flags(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["train", "digits", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert words in capsys.readouterr().err


def test_this_machine_has_room_for_python() -> None:
    room = room_of("cpu")
    assert room.size - room.tensors == PROCESS_OVERHEAD
    assert not room.cuda


def test_the_guess_is_near_the_peak(tmp_path: Path) -> None:
    """As benchmarks/memory.py has it for more; here with room for what other versions of libraries hold on to."""
    command = [sys.executable, str(BENCHMARK), "--only", "digits", "--json", str(tmp_path / "found.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=BENCHMARK.parent)
    (row,) = json.loads((tmp_path / "found.json").read_text())["recipes"].values()
    assert 0.75 < row["ratio"] < 1.25
