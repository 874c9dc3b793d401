"""The kernel's own livepatch selftests, as shipped, on the emulated kernel."""

import pytest

from elf.errors import KlpemuError
from klpemu.selftests import SCRIPTS, run_selftests, why_not
from klpemu.stock_kernel import StockKernel

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.mark.parametrize("image", ["built-in", "stock"])
def test_all_22_pass(stock_kernel: StockKernel, image: str) -> None:
    lines: list[str] = []
    kernel = stock_kernel.vmlinuz if image == "stock" else None
    runs = run_selftests(stock_kernel.livepatch, kernel, say=lines.append)
    assert [run.script for run in runs] == list(SCRIPTS)
    assert all(run.holds for run in runs), "\n".join(lines)
    assert sum(run.passed for run in runs) == 22
    assert len(lines) == 22


def test_what_fails_behind_the_scripts_backs_fails_them(
    stock_kernel: StockKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from klpemu.user_space import UserSpace

    def complaining(user_space: UserSpace) -> None:
        user_space.report(KlpemuError("something is wrong"))

    monkeypatch.setattr(UserSpace, "let_time_pass", complaining)
    (run,) = run_selftests(stock_kernel.livepatch, scripts=["test-sysfs.sh"])
    assert not run.holds
    assert "klpemu: something is wrong" in run.complaints


def test_a_kernel_that_logs_something_else_fails_them(
    stock_kernel: StockKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emu.printk import Printk

    monkeypatch.setattr(Printk, "pr_notice", lambda log, text: log.pr_info(f"{text}!"))
    lines: list[str] = []
    (run,) = run_selftests(stock_kernel.livepatch, scripts=["test-livepatch.sh"], say=lines.append)
    assert not run.holds
    assert (run.passed, run.status) == (0, 1)
    assert "TEST: basic function patching ... not ok" in lines
