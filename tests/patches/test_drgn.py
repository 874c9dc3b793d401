"""Somebody else reads our memory: drgn opens a saved machine, and its helpers see what klpemu's views see.

Nothing of klpemu takes part in drgn's reading: the types come from the DWARF in the vmlinux that was written,
the values from the core.
"""

import re
import struct
from pathlib import Path
from typing import Any

import drgn
import pytest
from drgn.helpers.linux.list import list_empty, list_for_each_entry, validate_list
from drgn.helpers.linux.module import for_each_module
from livepatches import Raw, fix_area, fix_shapes

from emu import view
from emu.fork import new_task
from emu.memory import read_string
from emu.symbol_file import save_symbols
from emu.vmcore import START_KERNEL_MAP, save_core
from klpemu import Kernel
from patches.variants.keep_nops import nops_kept

PAGE = 4096
PT_LOAD = 1
NOWHERE = 0xFFFF_FFFF_FFFF_FFFF


def as_saved(core: bytes) -> bytes:
    """Virtual addresses are looked up in the program headers."""
    return core


def by_page_tables(core: bytes) -> bytes:
    """No segment has a virtual address any more, so that every one is translated by the page tables."""
    data = bytearray(core)
    (count,) = struct.unpack_from("<H", data, 56)
    for at in range(64, 64 + 56 * count, 56):
        if data[at] == PT_LOAD:
            struct.pack_into("<Q", data, at + 16, NOWHERE)
    return bytes(data)


def opened(kernel: Kernel, folder: Path, change: Any = as_saved) -> drgn.Program:
    """The kernel as it is now, saved, changed, and opened as a user would open it."""
    core, vmlinux = folder / "vmcore", folder / "vmlinux"
    save_core(kernel.machine, core)
    save_symbols(kernel.machine, vmlinux)
    core.write_bytes(change(core.read_bytes()))
    prog = drgn.Program()
    prog.set_core_dump(core)
    prog.load_debug_info([vmlinux])
    return prog


World = dict[str, list[Any]]
FUNC = ("new_func", "old_func", "old_sympos", "old_size", "new_size", "nop", "patched", "transition")
FOPS = ("func", "next", "flags", "private", "trampoline", "trampoline_size")


def seen_by_drgn(prog: drgn.Program) -> World:
    def entries(struct: str, head: drgn.Object, member: str) -> list[drgn.Object]:
        validate_list(head.address_of_())
        return list(list_for_each_entry(f"struct {struct}", head.address_of_(), member))

    def func(each: drgn.Object) -> tuple[Any, ...]:
        name = each.old_name.string_().decode()
        return (each.value_(), name, *(each.member_(member).value_() for member in FUNC))

    return {
        "tasks": [
            (each.value_(), each.comm.string_().decode(), each.pid.value_(), each.patch_state.value_())
            for each in entries("task_struct", prog["init_task"].tasks, "tasks")
        ],
        "klp_ops": [
            (
                each.value_(),
                [each.fops.member_(member).value_() for member in FOPS],
                [func(found) for found in entries("klp_func", each.func_stack, "stack_node")],
            )
            for each in entries("klp_ops", prog["klp_ops"], "node")
        ],
        "klp_patches": [
            (
                each.value_(),
                each.mod.name.string_().decode(),
                each.enabled.value_(),
                each.replace.value_(),
                [
                    (
                        found.name.string_().decode() if found.name else None,
                        found.patched.value_(),
                        [func(one) for one in entries("klp_func", found.func_list, "node")],
                    )
                    for found in entries("klp_object", each.obj_list, "node")
                ],
            )
            for each in entries("klp_patch", prog["klp_patches"], "list")
        ],
        "klp_transition_patch": [prog["klp_transition_patch"].value_()],
        "modules": [each.name.string_().decode() for each in for_each_module(prog)],
    }


def seen_by_klpemu(kernel: Kernel) -> World:
    space, symbol = kernel.machine.space, kernel.machine.symbol

    def viewed(struct: str, address: int) -> Any:
        return kernel.machine.layouts.view(struct, space, address)

    def entries(struct: str, head: view.Struct, member: str) -> list[Any]:
        return list(view.list_for_each_entry(head, struct, member))

    def func(each: Any) -> tuple[Any, ...]:
        return (each.address_, read_string(space, each.old_name), *(getattr(each, member) for member in FUNC))

    def text(data: bytes) -> str:
        return data.split(b"\0")[0].decode()

    init_task = viewed("task_struct", symbol("init_task"))
    return {
        "tasks": [
            (each.address_, text(each.comm), each.pid, each.patch_state)
            for each in entries("task_struct", init_task.tasks, "tasks")
        ],
        "klp_ops": [
            (
                each.address_,
                [getattr(each.fops, member) for member in FOPS],
                [func(found) for found in entries("klp_func", each.func_stack, "stack_node")],
            )
            for each in entries("klp_ops", viewed("list_head", symbol("klp_ops")), "node")
        ],
        "klp_patches": [
            (
                each.address_,
                text(each.follow_("mod").name),
                each.enabled,
                each.replace,
                [
                    (
                        read_string(space, found.name) if found.name else None,
                        found.patched,
                        [func(one) for one in entries("klp_func", found.func_list, "node")],
                    )
                    for found in entries("klp_object", each.obj_list, "node")
                ],
            )
            for each in entries("klp_patch", viewed("list_head", symbol("klp_patches")), "list")
        ],
        "klp_transition_patch": [kernel.machine.variable("klp_transition_patch").get()],
        "modules": [
            text(each.name) for each in entries("module", viewed("list_head", symbol("modules")), "list")
        ],
    }


@pytest.fixture
def crowded(stacked: Kernel) -> Kernel:
    """Two patches over one function and, on top, one that is a real livepatch module; one more task."""
    stacked.insmod("builtin:klp_area.ko")
    new_task(stacked.machine, "another", stacked.machine.cpus[0])
    return stacked


@pytest.mark.parametrize("change", [as_saved, by_page_tables])
def test_drgn_sees_what_klpemu_sees(crowded: Kernel, tmp_path: Path, change: Any) -> None:
    prog = opened(crowded, tmp_path, change)
    seen = seen_by_drgn(prog)
    assert seen == seen_by_klpemu(crowded)
    tasks = {comm: pid for _, comm, pid, _ in seen["tasks"]}
    assert tasks["init"] == 1
    assert tasks["another"] > 1
    assert [patch for _, patch, *_ in seen["klp_patches"]] == ["fix_area", "fix_area2", "klp_area"]
    stacks = {funcs[0][1]: len(funcs) for _, _, funcs in seen["klp_ops"]}
    assert stacks == {"area_of": 3, "perimeter_of": 2}


def test_drgn_sees_a_machine_with_two_vcpus(tmp_path: Path) -> None:
    kernel = Kernel.load(cpus=2)
    kernel.enable(fix_area())
    seen = seen_by_drgn(opened(kernel, tmp_path))
    assert seen == seen_by_klpemu(kernel)
    assert len(seen["tasks"]) > 1


def test_drgn_sees_the_nops_of_a_replace(stacked: Kernel, tmp_path: Path) -> None:
    with nops_kept():
        stacked.enable(fix_shapes())
        seen = seen_by_drgn(opened(stacked, tmp_path))
        assert seen == seen_by_klpemu(stacked)
    nop = 2 + FUNC.index("nop")
    stacks = {funcs[0][1]: [each[nop] for each in funcs] for _, _, funcs in seen["klp_ops"]}
    assert stacks == {"area_of": [True], "perimeter_of": [False]}


def stored(kernel: Kernel, raw: Raw) -> None:
    """What no service does: other flags in a klp_func, another patch state, another name."""
    top = raw.funcs(raw.klp_ops(kernel.address_of("area_of")))[0]
    raw.put(raw.member("klp_func", top, "nop"), 1, 1)
    raw.put(raw.member("klp_func", top, "transition"), 1, 1)
    raw.put(raw.member("klp_func", top, "new_func"), 0x1234)
    raw.put(raw.member("task_struct", raw.current(kernel), "patch_state"), 1, 4)
    raw.space.write(raw.member("task_struct", raw.current(kernel), "comm"), b"changed\0")


@pytest.mark.parametrize("change", [as_saved, by_page_tables])
def test_drgn_sees_a_raw_store(stacked: Kernel, raw: Raw, tmp_path: Path, change: Any) -> None:
    before = seen_by_drgn(opened(stacked, tmp_path, change))
    assert before == seen_by_klpemu(stacked)
    stored(stacked, raw)
    after = seen_by_drgn(opened(stacked, tmp_path, change))
    assert after == seen_by_klpemu(stacked)
    assert after["tasks"][0][1:] == ("changed", 1, 1)
    tops = [{funcs[0][1]: funcs[0][2:] for _, _, funcs in seen["klp_ops"]} for seen in (before, after)]
    assert tops[0]["perimeter_of"] == tops[1]["perimeter_of"]
    values = dict(zip(FUNC, tops[1]["area_of"], strict=True))
    assert values == dict(zip(FUNC, tops[0]["area_of"], strict=True)) | {
        "nop": True,
        "transition": True,
        "new_func": 0x1234,
    }


def test_drgn_reads_every_mapped_page_and_no_other(stacked: Kernel, tmp_path: Path) -> None:
    prog = opened(stacked, tmp_path, by_page_tables)
    space = stacked.machine.space
    mapped = {page << 12 for page in space._frames}
    for page in mapped:
        assert prog.read(page, PAGE) == space.read(page, PAGE), hex(page)
        for neighbour in (page - PAGE, page + PAGE):
            if neighbour not in mapped:
                with pytest.raises(drgn.FaultError):
                    prog.read(neighbour, 1)


def test_another_root_in_the_note_is_another_machine(stacked: Kernel, tmp_path: Path) -> None:
    def damaged(core: bytes) -> bytes:
        wrong, count = re.subn(
            rb"(SYMBOL\(swapper_pg_dir\)=)\w{16}", b"\\g<1>%x" % (START_KERNEL_MAP + PAGE), core
        )
        assert count == 1
        return by_page_tables(wrong)

    prog = opened(stacked, tmp_path, damaged)
    with pytest.raises(drgn.FaultError):
        seen_by_drgn(prog)


def test_drgn_names_functions_and_their_source(stacked: Kernel, tmp_path: Path) -> None:
    prog = opened(stacked, tmp_path)
    assert prog.main_module().build_id is not None
    for ops in list_for_each_entry("struct klp_ops", prog["klp_ops"].address_of_(), "node"):
        assert not list_empty(ops.func_stack.address_of_())
        func = next(iter(list_for_each_entry("struct klp_func", ops.func_stack.address_of_(), "stack_node")))
        symbol = prog.symbol(func.old_func.value_())
        assert symbol.name == func.old_name.string_().decode()
        assert "shapes.c" in str(prog.source_location(func.old_func.value_()))
        site = func.old_func.value_()
        assert prog.read(site, 5) == stacked.site_of(symbol.name)[1]
    assert prog.symbol(stacked.machine.symbol("klp_ftrace_handler")).name == "klp_ftrace_handler"


def test_drgn_takes_a_module_s_symbols_too(stacked: Kernel, tmp_path: Path) -> None:
    prog = opened(stacked, tmp_path)
    save_symbols(stacked.machine, tmp_path / "fix_area2", "fix_area2")
    placement = stacked.machine.modules.objects["fix_area2"].placement
    module = prog.extra_module("fix_area2", create=True)
    module.address_ranges = [(placement.base, placement.base + placement.size)]
    module.try_file(tmp_path / "fix_area2")
    newest = stacked.address_of("fix_area2:area_in_cm")
    assert prog.symbol(newest).name == "area_in_cm"
    assert prog["area_in_cm"].address_ == newest
