"""modinfo of stock modules, compared with kmod's."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from klpemu.command import Session
from klpemu.kmod import modinfo
from klpemu.module_tree import ModuleTree
from klpemu.stock_kernel import StockKernel

SIGNATURE = ("sig_id:", "signer:", "sig_key:", "sig_hashalgo:", "signature:", "\t\t")


@pytest.mark.skipif(shutil.which("modinfo") is None, reason="no modinfo (package kmod)")
def test_modinfo_prints_of_stock_modules_what_kmods_does(stock_kernel: StockKernel) -> None:
    modules = random.Random(6).sample(stock_kernel.modules, 200)
    real = subprocess.run(["modinfo", *modules], capture_output=True, text=True, check=True).stdout
    session = Session("modinfo", None, ModuleTree([], ""))  # type: ignore[arg-type]  # it asks no kernel
    assert modinfo(session, [str(path) for path in modules]) == 0
    expected = [line for line in real.splitlines() if not line.startswith(SIGNATURE)]
    assert "".join(session.out).splitlines() == expected
    assert any(line.startswith("parm:") for line in expected)


def test_modprobe_finds_stock_modules_and_what_they_depend_on(stock_kernel: StockKernel) -> None:
    tree = ModuleTree([stock_kernel.directory / "lib/modules"], stock_kernel.release)
    found = tree.find("mac80211")
    assert found is not None
    order = [each.name for each in tree.with_dependencies(found)]
    assert order[-1] == "mac80211"
    assert {"cfg80211", "libarc4", "rfkill"} <= set(order)
    assert order.index("rfkill") < order.index("cfg80211")
    assert tree.find("snd-pcm") == tree.find("snd_pcm") is not None
    assert Path(found.path).is_relative_to(stock_kernel.directory)
