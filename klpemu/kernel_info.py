"""What a kernel is once it is booted: sites, symbols, what became of its text, who answers for what."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from emu.memory import read_string
from klpemu.fixtures import shown
from klpemu.kernel import Kernel
from klpemu.output import Output

__all__ = ["KernelInfo", "kernel_info", "kernel_object", "print_kernel"]


@dataclass(frozen=True)
class KernelInfo:
    """A booted kernel.

    `applied` has for each table of the image what was rewritten, left as it was, and refused; `decisions` are
    the mitigations that the CPU asks for, in the kernel's words; `answered` are the functions whose body
    Python takes the place of, `refused` those that need more of a system than there is: a call is an error.
    """

    path: str
    banner: str
    cpus: int
    cpu: str
    handler: str
    symbols: int
    sites: int
    return_thunk: str
    decisions: Mapping[str, str]
    applied: Mapping[str, tuple[int, int, tuple[str, ...]]]
    answered: tuple[str, ...] = field(repr=False)
    refused: tuple[str, ...] = field(repr=False)


def kernel_info(kernel: Kernel) -> KernelInfo:
    """Explain a booted kernel."""
    machine = kernel.machine
    text = machine.text_at_load.get("")
    symbols = machine.vmlinux.symbols
    own = "__klpemu_" if machine.vmlinux.table is not None else ""
    left = [
        name
        for name in sorted(set(machine.vmlinux.exits.values()) - {"klpemu_return"})
        if not own or f"{own}{name}" in symbols
    ]
    handler = machine.symbol("klp_ftrace_handler")
    entry = machine.vmlinux.entry
    return KernelInfo(
        path=machine.image.path,
        banner=_banner(kernel),
        cpus=len(machine.cpus),
        cpu=text.cpu if text is not None else "",
        handler="own" if entry.start <= handler < entry.start + entry.size else "kernel",
        symbols=len(machine.kallsyms.symbols()),
        sites=len(machine.modules.objects[""].sites),
        return_thunk=text.return_thunk if text is not None else "",
        decisions=dict(text.decisions) if text is not None else {},
        applied={
            each.kind: (each.applied, each.left, tuple(each.refused))
            for each in (text.applied if text is not None else ())
        },
        answered=tuple(name for name in left if name in machine.traps.exports),
        refused=tuple(name for name in left if name not in machine.traps.exports),
    )


def _banner(kernel: Kernel) -> str:
    """linux_banner (init/version.c), which the built-in kernel has not."""
    address = kernel.machine.vmlinux.symbols.get("linux_banner")
    return read_string(kernel.machine.space, address).rstrip("\n") if address else ""


def print_kernel(output: Output, info: KernelInfo) -> None:
    """All of it, as lines."""
    output.line((shown(info.path), "bold"))
    if info.banner:
        output.fact("banner", info.banner)
    output.fact("handler", info.handler)
    output.fact("symbols", f"{info.symbols:,}")
    output.fact("sites", f"{info.sites:,}")
    output.heading(f"Text, for {info.cpus} x {info.cpu}" if info.cpu else "Text, as it was linked")
    for name, decision in info.decisions.items():
        output.fact(name, decision)
    output.fact("return thunk", info.return_thunk or "none")
    for kind, (applied, left, refused) in info.applied.items():
        output.fact(kind, f"{applied:,} applied, {left:,} left")
        for why in refused:
            output.line((why, "yellow"), indent=4)
    output.heading(f"Answered in Python: {len(info.answered)} functions")
    output.line(" ".join(info.answered), indent=2, hang=0)
    output.heading(f"Refused when called: {len(info.refused)} functions")
    output.line(" ".join(info.refused), indent=2, hang=0)


def kernel_object(info: KernelInfo) -> dict[str, object]:
    """The same for `--json`."""
    return {
        "holds": True,
        "file": shown(info.path),
        "banner": info.banner,
        "cpus": info.cpus,
        "cpu": info.cpu,
        "handler": info.handler,
        "symbols": info.symbols,
        "sites": info.sites,
        "return_thunk": info.return_thunk,
        "decisions": dict(info.decisions),
        "applied": [
            {"table": kind, "applied": applied, "left": left, "refused": list(refused)}
            for kind, (applied, left, refused) in info.applied.items()
        ],
        "answered": list(info.answered),
        "refused": list(info.refused),
    }
