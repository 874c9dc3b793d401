"""Tasks asleep inside functions of stock modules, and transitions of patches of these modules.

A patch of the function that a task sleeps in has to wait exactly as long as the task is there; a patch of
another function of the same module does not wait for it at all.

The functions read and write their own structs, whose members are where the module's code has them; of a
task_struct they touch what has the same place in ours (thread_info.flags), or leave it to exports.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from elf.image import Image
from emu.machine import Machine
from emu.task import Task
from emu.timer import HZ
from klpemu import Func, Kernel, Patch
from klpemu.stock_kernel import StockKernel
from patches.handler import append_klp_ftrace_handler

MSECS_PER_JIFFY = 1000 // HZ
HELD = 3100  # milliseconds, where it is for the test to say
WORK = 1  # jiffies: what an attempt, or loading a patch, takes itself


@dataclass(frozen=True)
class Scene:
    """A call that sleeps, what it returns in the end, and what another task does to end it."""

    call: str
    result: int
    ends: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stock:
    """A function of a stock module that sleeps, another one of the same module, and the livepatch's code.

    `below` is what the function has called to sleep, `replaced` what the replacement returns.
    """

    module: str
    function: str
    other: str
    below: str
    replaced: int
    scene: Callable[[Kernel], Scene]

    @property
    def name(self) -> str:
        """The module as the kernel calls it."""
        return self.module.replace("-", "_")

    def patch(self, fixtures_dir: Path, function: str) -> Patch:
        """A livepatch of one of the two functions."""
        code = f"fix_{self.name}"
        return Patch(code, {self.name: [Func(function, f"fixed_{function}")]}, fixtures_dir / f"{code}.o")


def memory(kernel: Kernel, size: int, **words: int) -> int:
    """Zeroed memory with 64-bit words at the given offsets (`at_0x28=...`)."""
    address = kernel.machine.slab.kzalloc(size, "stock struct")
    for name, value in words.items():
        kernel.machine.space.write(address + int(name.removeprefix("at_"), 16), value.to_bytes(8, "little"))
    return address


def voltage(kernel: Kernel) -> Scene:
    """msleep(120), with the registers set and read over a bus that takes everything.

    struct dvb_frontend: sec_priv; struct lnbh25_priv: i2c.
    """
    private = memory(kernel, 0x20, at_0x0=memory(kernel, 0x400))
    frontend = memory(kernel, 0x400, at_0x328=private)
    return Scene(f"lnbh25_set_voltage({frontend}, 0)", 0)


def sound_memory(kernel: Kernel) -> Scene:
    """mutex_lock(&hdr->block_mutex), on what the module itself has made."""
    header = kernel.call("snd_util_memhdr_new", 100_000)
    assert kernel.call("snd_util_mem_alloc", header, 1000)
    mutex = header + 0x28
    return Scene(
        f"snd_util_mem_avail({header})", 99_000, (f"mutex_unlock({mutex})",), (f"mutex_lock({mutex})",)
    )


def memory_stick(kernel: Kernel) -> Scene:
    """wait_for_completion(&card->mrq_complete), completed by the request function of the module.

    struct memstick_host: card, request; struct memstick_dev: host, mrq_complete.
    """
    host = memory(kernel, 0x400, at_0x348=kernel.address_of("area_of"))
    card = memory(kernel, 0x100, at_0x8=host)
    kernel.machine.space.write(host + 0x338, card.to_bytes(8, "little"))
    kernel.call("__init_swait_queue_head", card + 0x18 + 8)
    request = memory(kernel, 8)
    step = f"memstick_next_req({host}, {request})"
    return Scene(f"memstick_set_rw_addr({card})", 0, (step, step))


def resume(kernel: Kernel) -> Scene:
    """wait_event_interruptible_timeout(dev->resume_wq, !dev->resume_flag, 50 ms); nobody clears the flag."""
    device = memory(kernel, 0x100, at_0x48=1)
    kernel.call("__init_waitqueue_head", device + 0x30)
    return Scene(f"ishtp_wait_resume({device})", 0)


def buffers(kernel: Kernel) -> Scene:
    """wait_event(q->done_wq, !atomic_read(&q->owned_by_drv_count)); the module's own error path wakes.

    struct vb2_queue: owned_by_drv_count (the upper half of a word), done_wq, streaming and
    start_streaming_called.
    """
    queue = memory(kernel, 0x400, at_0x1e8=1 << 32, at_0x220=3)
    kernel.call("__init_waitqueue_head", queue + 0x208)
    ends = f"store_to({queue + 0x1E8}, 0)", f"vb2_queue_error({queue})"
    return Scene(f"vb2_wait_for_all_buffers({queue})", 0, ends)


STOCK = [
    Stock("lnbh25", "lnbh25_set_voltage", "lnbh25_release", "msleep", 100, voltage),
    Stock("snd-util-mem", "snd_util_mem_avail", "snd_util_memhdr_new", "mutex_lock", 98_304, sound_memory),
    Stock(
        "memstick",
        "memstick_set_rw_addr",
        "memstick_detect_change",
        "wait_for_completion",
        -5,
        memory_stick,
    ),
    Stock("intel-ishtp", "ishtp_wait_resume", "ishtp_get_drvdata", "schedule_timeout", 2, resume),
    Stock(
        "videobuf2-common",
        "vb2_wait_for_all_buffers",
        "vb2_request_object_is_buffer",
        "schedule",
        -16,
        buffers,
    ),
]
by_name = pytest.mark.parametrize("stock", STOCK, ids=lambda stock: stock.function)


@pytest.fixture
def kernel(fixtures_dir: Path) -> Kernel:
    """The built-in kernel with an I2C bus on which every transfer works.

    What the modules import besides belongs to functions that nobody calls here: a call of it fails.
    """
    machine = Machine(
        Image.open(fixtures_dir / "kernel.o"),
        entry_code=(append_klp_ftrace_handler,),
        stubs=("klp_enable_patch", "i2c_transfer", "another_export"),
    )
    machine.traps.exports["i2c_transfer"] = lambda machine, registers: registers["rdx"]
    machine.modules.missing = lambda symbol, name: machine.symbol("another_export")
    return Kernel(machine, observe=True)


def functions_on(stack: tuple[str, ...]) -> list[str]:
    return [each.split("+")[0] for each in stack]


def put_to_sleep(
    kernel: Kernel, stock: Stock, stock_kernel: StockKernel, *, kthread: bool
) -> tuple[Task, Scene]:
    """A task asleep in the function, and another one that will end that, if time alone does not."""
    kernel.load_module(stock_kernel.module(stock.module))
    scene = stock.scene(kernel)
    if scene.ends:
        kernel.tasks.spawn("waker", [*scene.begins, f"sleep({HELD})", *scene.ends], kthread=True)
        kernel.tasks.run(2 * MSECS_PER_JIFFY)
    task = kernel.tasks.spawn("sleeper", [scene.call, "sleep(60000)"], kthread=kthread)
    kernel.tasks.run(2 * MSECS_PER_JIFFY)
    state = kernel.tasks.state_of(task)
    assert state.state == "sleeping"
    assert functions_on(state.stack) == [stock.below, stock.function]
    return task, scene


def returned(kernel: Kernel, task: Task) -> list[int]:
    """What the task's calls have returned, as C ints."""
    results = [result & 0xFFFF_FFFF for _, result in kernel.tasks.state_of(task).returned]
    return [result - (1 << 32) if result >> 31 else result for result in results]


def call_now(kernel: Kernel, scene: Scene) -> int:
    """Call the function once more, which must not sleep any more."""
    task = kernel.tasks.spawn("again", [scene.call, "sleep(60000)"])
    assert kernel.tasks.run(40, lambda: bool(returned(kernel, task)))
    return returned(kernel, task)[0]


def wait_until_it_leaves(kernel: Kernel, stock: Stock, task: Task) -> None:
    """Let the task leave the function; in every jiffy until then it holds the transition, and says why."""
    jiffies = running = 0
    while stock.function in functions_on((state := kernel.tasks.state_of(task)).stack):
        assert (state.version, state.pending) == ("unpatched", True)
        assert kernel.in_transition == f"fix_{stock.name}"
        assert returned(kernel, task) == []
        if state.state == "sleeping":
            assert state.why == f"is sleeping on function {stock.function}"
        else:
            running += 1
        kernel.tasks.run(MSECS_PER_JIFFY)
        jiffies += 1
    assert jiffies > 5
    assert running <= 3, "on its way out"


@by_name
def test_a_patch_of_the_function_waits_for_a_user_task_exactly_as_long_as_that_is_there(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path, stock: Stock
) -> None:
    """Returning to user space the task switches itself, in the jiffy in which it leaves the function."""
    task, scene = put_to_sleep(kernel, stock, stock_kernel, kthread=False)
    kernel.enable(stock.patch(fixtures_dir, stock.function))
    wait_until_it_leaves(kernel, stock, task)
    assert returned(kernel, task) == [scene.result]
    assert kernel.in_transition
    assert kernel.tasks.state_of(task).version == "patched"
    assert kernel.tasks.run(1100, lambda: not kernel.in_transition)
    assert kernel.machine.timers.jiffies % HZ <= WORK, "the next retry finds all tasks switched"
    assert call_now(kernel, scene) == stock.replaced
    kernel.verify().raise_for_findings()


@by_name
def test_a_patch_of_the_function_waits_for_a_kernel_thread_up_to_the_retry_that_finds_it_gone(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path, stock: Stock
) -> None:
    task, scene = put_to_sleep(kernel, stock, stock_kernel, kthread=True)
    kernel.enable(stock.patch(fixtures_dir, stock.function))
    wait_until_it_leaves(kernel, stock, task)
    assert returned(kernel, task) == [scene.result]
    state = kernel.tasks.state_of(task)
    assert (state.version, state.pending, state.why) == ("unpatched", True, "")
    left = kernel.machine.timers.jiffies
    assert kernel.tasks.run(1100, lambda: not kernel.in_transition)
    retry = -(-left // HZ) * HZ
    assert 0 <= kernel.machine.timers.jiffies - retry <= WORK, "the first whole second behind that"
    assert call_now(kernel, scene) == stock.replaced
    kernel.verify().raise_for_findings()


@by_name
@pytest.mark.parametrize("kthread", [False, True], ids=["user", "kthread"])
def test_a_patch_of_another_function_of_the_module_does_not_wait_at_all(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path, stock: Stock, kthread: bool
) -> None:
    task, scene = put_to_sleep(kernel, stock, stock_kernel, kthread=kthread)
    before = kernel.machine.timers.jiffies
    kernel.enable(stock.patch(fixtures_dir, stock.other))
    assert kernel.in_transition == ""
    assert kernel.machine.timers.jiffies - before <= WORK
    assert functions_on(kernel.tasks.state_of(task).stack) == [stock.below, stock.function]
    kernel.tasks.run(HELD + 100)
    assert returned(kernel, task) == [scene.result]
    kernel.verify().raise_for_findings()


def test_a_function_that_has_jumped_to_where_it_sleeps_is_not_waited_for(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path
) -> None:
    """cfi_udelay() ends in a jump to msleep(): nothing of it will execute any more."""
    kernel.load_module(stock_kernel.module("cfi_util"))
    task = kernel.tasks.spawn("sleeper", ["cfi_udelay(3000000)", "sleep(60000)"])
    kernel.tasks.run(2 * MSECS_PER_JIFFY)
    assert functions_on(kernel.tasks.state_of(task).stack) == ["msleep"]
    func = Func("cfi_udelay", "fixed_cfi_udelay")
    kernel.enable(Patch("fix_cfi_util", {"cfi_util": [func]}, fixtures_dir / "fix_cfi_util.o"))
    assert kernel.in_transition == ""
    kernel.tasks.run(2900)
    assert returned(kernel, task) == []
    kernel.tasks.run(200)
    assert len(returned(kernel, task)) == 1
    kernel.verify().raise_for_findings()
