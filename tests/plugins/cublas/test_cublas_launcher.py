"""When Triton is asked to launch, and when what it compiled is launched by itself: by stand-ins for both."""

from __future__ import annotations

import pytest
import torch

launcher = pytest.importorskip("quantplug_cublas.launcher", reason="triton is installed on Linux only")
launch = pytest.importorskip("quantplug_cublas.launch")

GRID = (3, 2, 1)


class Kernel:
    """A `triton.jit` function: tells what it compiled, and everything that was launched."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.launched: list[tuple[object, ...]] = []

    def __getitem__(self, grid):
        def run(*given, num_warps, **constants):
            self.asked.append((grid, num_warps, *given, *constants.values()))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *given, stream: self.kernel.launched.append((grid, stream, *given))


class Driver:
    """Triton's, of a device that has one stream."""

    def get_current_stream(self, device):
        return 70 + device


@pytest.fixture
def compiling(monkeypatch):
    """Compile where the interpreter would run."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(launcher.driver, "_active", Driver())


@pytest.mark.usefixtures("compiling")
def test_what_was_compiled_is_launched_with_all_arguments_on_the_current_stream():
    kernel, x = Kernel(), torch.ones(4)
    made = launcher.Launcher(kernel, 8, TOP=448.0, BLOCK=16)
    for _ in range(3):
        made(GRID, 1, launcher.kind(x), (x, None), (5, 1))
    assert kernel.asked == [(GRID, 8, x, None, 5, 1, 448.0, 16)]
    assert kernel.launched == [(GRID, 71, x, None, 5, 1, 448.0, 16)] * 2


@pytest.mark.usefixtures("compiling")
def test_what_code_depends_on_is_compiled_anew():
    kernel, x = Kernel(), torch.ones(8)
    made = launcher.Launcher(kernel, 4, BLOCK=16)
    for device, tensor, number in ((0, x, 5), (1, x, 5), (0, x[1:], 5), (0, x.double(), 5), (0, x, 6)):
        for _ in range(2):
            made(GRID, device, launcher.kind(tensor), (tensor,), (number,))
    assert len(kernel.asked) == len(kernel.launched) == 5


@pytest.mark.usefixtures("compiling")
def test_a_launcher_does_not_remember_without_end(monkeypatch):
    monkeypatch.setattr(launcher, "_KNOWN", 3)
    kernel, x = Kernel(), torch.ones(4)
    made = launcher.Launcher(kernel, 4)
    for number in range(10):
        made(GRID, 0, None, (x,), (number,))
    assert len(kernel.asked) == 10
    assert len(made._compiled) <= 3


def test_the_interpreter_is_asked_every_time(monkeypatch):
    monkeypatch.setattr(launcher, "INTERPRETED", True)
    kernel, x = Kernel(), torch.ones(4)
    made = launcher.Launcher(kernel, 4)
    for _ in range(3):
        made(GRID, -1, None, (x,), (1,))
    assert len(kernel.asked) == 3


@pytest.mark.usefixtures("compiling")
def test_every_launch_tells_of_tensors_that_come_from_elsewhere(monkeypatch):
    """x, scales and a bias at any address and in any dtype get code of their own."""
    kernel = Kernel()
    for name in ("quantize_tokens", "quantize_groups", "quantize_by", "scale_product"):
        monkeypatch.setattr(launch, name, kernel)
    made = launch._tokens, launch._groups, launch._scale, launch._product
    for remembered in made:
        remembered.cache_clear()
    float8, sums = torch.float8_e4m3fn, torch.ones(3, 16)
    wide, scales, bias = torch.ones(4 * 128 + 1), torch.ones(18), torch.ones(17)

    def calls(x, one, bias):
        """One of each kind, what differs in turns."""
        yield launch.by_tokens(x, 128, float8)
        yield launch.by_groups(x, 4, 128, float8)
        yield launch.by_scale(x, one, 128, float8)
        yield launch.scaled(sums, one, scales[:16], bias, 16, torch.bfloat16)

    given = (wide[:512].view(4, 128), scales[:1], bias[:16])
    for others in (
        (),
        (wide[1:].view(4, 128), *given[1:]),
        (given[0].bfloat16(), *given[1:]),
        (given[0], scales[1:2], given[2]),
        (*given[:2], bias[1:]),
        (*given[:2], given[2].bfloat16()),
        (*given[:2], None),
    ):
        for _ in range(2):
            list(calls(*(others or given)))
    # Of x: two more kinds of three launches; of the scale: two launches; of the bias: one launch, three times.
    wanted = 4 + 2 * 3 + 2 + 3
    assert len(kernel.asked) == wanted
    assert len(kernel.launched) == 7 * 2 * 4 - wanted
    for remembered in made:
        remembered.cache_clear()
