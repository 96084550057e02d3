"""Every fault of `make mutants` still has its one place in the code, and tests that exist."""

import pytest
from mutants import MUTANTS, ROOT, Mutant, planted


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 60
    assert len({mutant.fault for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_applies(mutant: Mutant) -> None:
    path = ROOT / "src" / "varpi" / mutant.file
    text = path.read_text(encoding="utf-8")
    faulty = planted(mutant, text)
    assert faulty != text
    compile(faulty, path, "exec")
    tests, _, chosen = mutant.tests.partition(" -k ")
    assert chosen in (ROOT / "tests" / tests).read_text(encoding="utf-8")
