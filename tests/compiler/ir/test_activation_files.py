"""Files of activations: what is written is read, and files that were given up are written again."""

from __future__ import annotations

from pathlib import Path

import torch

from belle_compile.compiler.ir.activation_files import ActivationFiles


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    files, x = ActivationFiles(tmp_path / "new"), torch.randn(5, 7)
    files.write("a", x)
    files.write("b", x.T)
    assert torch.equal(files.read("a"), x) and torch.equal(files.read("b"), x.T)
    files.write("a", 2 * x[:2])
    assert torch.equal(files.read("a"), 2 * x[:2])
    assert torch.equal(ActivationFiles(tmp_path / "new").read("a"), 2 * x[:2])


def test_a_file_that_was_given_up_is_written_again(tmp_path: Path) -> None:
    files = ActivationFiles(tmp_path)
    files.write("a", torch.zeros(5, 7))
    before, read = inodes(tmp_path), files.read("a")
    files.release("a")
    files.release("a")
    files.write("smaller", torch.ones(2, 7))
    assert len(inodes(tmp_path)) == 2  # a file of another size is not taken
    files.write("b", torch.ones(7, 5))
    assert inodes(tmp_path) > before and len(inodes(tmp_path)) == 2
    assert torch.equal(files.read("b"), torch.ones(7, 5)) and torch.equal(read, torch.zeros(5, 7))


def test_nothing_stays_of_what_was_given_up(tmp_path: Path) -> None:
    killed = ActivationFiles(tmp_path)
    killed.write("a", torch.zeros(3))
    killed.release("a")
    files = ActivationFiles(tmp_path)
    files.write("b", torch.ones(3))
    files.write("c", torch.ones(4))
    files.release("b")
    files.remove_released()
    assert [path.stem for path in tmp_path.iterdir()] == ["c"]


def test_what_is_missing_is_read_from_the_base(tmp_path: Path) -> None:
    base = ActivationFiles(tmp_path / "base")
    base.write("a", torch.zeros(3))
    base.write("b", torch.zeros(3))
    branch = ActivationFiles(tmp_path / "branch", base)
    branch.write("b", torch.ones(3))
    assert torch.equal(branch.read("a"), torch.zeros(3)) and torch.equal(branch.read("b"), torch.ones(3))
    assert torch.equal(base.read("b"), torch.zeros(3))
