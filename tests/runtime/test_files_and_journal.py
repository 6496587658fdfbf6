"""Atomic files, journals, checkpoints, seeds: what resume and safety stand on."""

from __future__ import annotations

import json

import pytest
import torch

from hyperdb.runtime import checkpoint, files, journal
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import atomic, hash_files, load_json, load_tensors, save_json, save_tensors
from hyperdb.runtime.optim import EMA, Muon, Schedule, adamw, orthogonal
from hyperdb.runtime.seed import derive, generator, numpy_rng


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    save_json(path, {"a": 1})

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert load_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        save_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_foreign_files_give_one_clear_line(tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a tensor file")
    none = tmp_path / "none"
    for read, path in ((load_tensors, bad), (load_json, bad), (load_tensors, none), (load_json, none)):
        with pytest.raises(UserError, match=str(path)):
            read(path)


def test_a_damaged_file_may_be_removed_by_another(tmp_path, monkeypatch):
    path = save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-1])
    read = files.load_tensors

    def removed(path):
        try:
            return read(path)
        finally:
            path.unlink()

    monkeypatch.setattr(files, "load_tensors", removed)
    assert files.load_made(path) is None


def test_hash_depends_on_names_and_bytes(tmp_path):
    (tmp_path / "a").write_text("1")
    first = hash_files(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = hash_files(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, renamed, hash_files(tmp_path)}) == 3


def test_streams_are_private_and_stable():
    before = torch.get_rng_state()
    assert derive(0, "a", 1) == derive(0, "a", 1) != derive(0, "a", 2)
    assert derive(0, "a") == 8898938347678966206
    one, two = (torch.randn(3, generator=generator(7, "x", 1)) for _ in "ab")
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.randn(3, generator=generator(7, "x", 2)))
    assert numpy_rng(1, "x").integers(100) == numpy_rng(1, "x").integers(100)
    assert torch.equal(before, torch.get_rng_state())


def test_journal_of_a_resumed_run_equals_that_of_one_run(tmp_path):
    def write(path, start, stop):
        with journal.Journal(path, 6, start, every=1) as j:
            for step in range(start, stop):
                j.step(step + 1, 1.0)

    write(tmp_path / "whole", 0, 6)
    write(tmp_path / "parts", 0, 5)  # a checkpoint at step 3, killed after 5
    write(tmp_path / "parts", 3, 6)
    steps = [[r["step"] for r in journal.read(tmp_path / n)] for n in ("whole", "parts")]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]


def test_journal_names_the_step_of_a_bad_loss(tmp_path):
    with journal.Journal(tmp_path / "j", 3) as j, pytest.raises(journal.NonFiniteError, match="step 2"):
        j.step(2, float("nan"))


def test_journal_ignores_a_torn_last_line(tmp_path):
    path = tmp_path / "j"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert journal.read(path) == [{"step": 1}]


def _optimizer(kind: str, model: torch.nn.Linear) -> torch.optim.Optimizer:
    if kind == "adamw":
        return adamw(model.parameters(), 1e-2)
    if kind == "muon":
        return Muon([model.bias], 1e-2, [model.weight], 1e-2)
    return Muon([model.bias], 1e-2, [], 0.0, [model.weight], 1e-2)


def _train(steps, path, start_from_checkpoint=False, config=None, kind="adamw"):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = _optimizer(kind, model)
    ema = EMA(model.parameters(), 0.9)
    start = checkpoint.load(path, optimizer, ema, config or {}) if start_from_checkpoint else 0
    for step in range(start, steps):
        x = torch.randn(8, 4, generator=generator(0, step))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
    checkpoint.save(path, steps, optimizer, ema, config or {})
    return [p.detach().clone() for p in model.parameters()] + ema.average


@pytest.mark.parametrize("kind", ["adamw", "muon", "plain"])
def test_resume_is_bit_for_bit(tmp_path, kind):
    whole = _train(7, tmp_path / "a.safetensors", kind=kind)
    _train(3, tmp_path / "b.safetensors", kind=kind)
    parts = _train(7, tmp_path / "b.safetensors", start_from_checkpoint=True, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_what_stays_fixed_comes_back_too(tmp_path):
    model = torch.nn.Linear(4, 2)
    optimizer, ema, path = adamw(model.parameters(), 1e-2), EMA(model.parameters(), 0.9), tmp_path / "a.safetensors"
    checkpoint.save(path, 1, optimizer, ema, {}, [torch.arange(3.0)])
    found = torch.zeros(3)
    assert checkpoint.load(path, optimizer, ema, {}, [found]) == 1
    assert torch.equal(found, torch.arange(3.0))
    for other in ([torch.zeros(4)], [torch.zeros(3), torch.zeros(1)]):
        with pytest.raises(UserError):
            checkpoint.load(path, optimizer, ema, {}, other)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (3, 24, 48)])
def test_orthogonal_moves_singular_values_near_one_and_keeps_the_directions(shape):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(given)
    size = torch.linalg.svdvals(found)
    assert size.min() > 0.5
    assert size.max() < 1.4
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    assert (u.mT @ found @ v.mT).diagonal(dim1=-2, dim2=-1).min() > 0.5



def test_plain_steps_go_along_the_average_of_the_gradients():
    """Two steps by hand: the average is .05 g, then .95 * .05 g + .05 h; Nesterov looks one ahead."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = Muon([torch.nn.Parameter(torch.zeros(1))], 0.0, [], 0.0, [param], 2.0)
    g, h = torch.tensor([1.0, -3.0]), torch.tensor([2.0, 1.0])
    for gradient in (g, h):
        param.grad = gradient
        optimizer.step()
    first, second = 0.05 * g, 0.95 * 0.05 * g + 0.05 * h
    wanted = -2.0 * sum(0.05 * x + 0.95 * m for x, m in ((g, first), (h, second)))
    torch.testing.assert_close(param.detach(), wanted)


def _convolve(first, last, path):
    """Train a convolution whose numbers are not in memory as its shape says; return its weights."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer, ema = adamw(model.parameters(), 1e-2), EMA(model.parameters(), 0.9)
    assert checkpoint.load(path, optimizer, ema, {}) == first
    for step in range(first, last):
        x = torch.randn(2, 3, 5, 5, generator=generator(0, step)).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        ema.update(step)
    checkpoint.save(path, last, optimizer, ema, {})
    return model.weight.detach().clone()


def test_resume_keeps_the_order_of_numbers_in_memory(tmp_path):
    whole = _convolve(0, 6, tmp_path / "whole.safetensors")
    _convolve(0, 3, tmp_path / "parts.safetensors")
    assert torch.equal(_convolve(3, 6, tmp_path / "parts.safetensors"), whole)


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    _train(2, tmp_path / "a.safetensors", config={"rate": 1})
    with pytest.raises(UserError, match="rate"):
        _train(4, tmp_path / "a.safetensors", start_from_checkpoint=True, config={"rate": 2})


def test_schedule_warms_up_holds_and_falls():
    schedule = Schedule(100, warmup=10, decay=0.5)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(9) == schedule(30) == schedule(50) == 1.0
    assert 0.4 < schedule(75) < 0.6
    assert schedule(99) < 0.02


def test_ema_swap_is_its_own_inverse(tmp_path):
    model = torch.nn.Linear(2, 2)
    ema = EMA(model.parameters(), 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    kept, average = model.weight.clone(), ema.average[0].clone()
    ema.swap()
    assert torch.equal(model.weight, average)
    ema.swap()
    assert torch.equal(model.weight, kept)


def test_tensors_round_trip(tmp_path):
    x = {"a": torch.arange(6.0).reshape(2, 3).T}
    save_tensors(tmp_path / "x.safetensors", x, {"k": "v"})
    tensors, metadata = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(tensors["a"], x["a"])
    assert metadata["k"] == "v"
