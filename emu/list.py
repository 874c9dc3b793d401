"""The kernel's circular doubly linked lists (include/linux/list.h), on views of `struct list_head`.

The order of the stores is the kernel's.  With the _rcu forms a reader in between sees, going forwards, either
the old list or the new one.
"""

from typing import Any

__all__ = [
    "LIST_POISON1",
    "LIST_POISON2",
    "init_list_head",
    "list_add",
    "list_add_rcu",
    "list_add_tail",
    "list_del",
    "list_del_rcu",
    "list_empty",
    "list_is_singular",
]

# include/linux/poison.h with CONFIG_ILLEGAL_POINTER_VALUE of x86-64
LIST_POISON1 = 0xDEAD_0000_0000_0100
LIST_POISON2 = 0xDEAD_0000_0000_0122


def init_list_head(head: Any) -> None:
    """Make `head` an empty list."""
    head.next = head.address_
    head.prev = head.address_


def list_add(new: Any, head: Any) -> None:
    """Insert `new` right after `head`, so that it is the first."""
    _add_between(new, head, _at(head, head.next))


def list_add_tail(new: Any, head: Any) -> None:
    """Insert `new` right before `head`, so that it is the last."""
    _add_between(new, _at(head, head.prev), head)


def list_add_rcu(new: Any, head: Any) -> None:
    """Insert `new` right after `head`; it can be reached only once its own pointers are set (rculist.h)."""
    after = _at(head, head.next)
    new.next = after.address_
    new.prev = head.address_
    head.next = new.address_
    after.prev = new.address_


def list_del(entry: Any) -> None:
    """Unlink `entry` and poison both of its pointers."""
    _unlink(entry)
    entry.next = LIST_POISON1
    entry.prev = LIST_POISON2


def list_del_rcu(entry: Any) -> None:
    """Unlink `entry` and leave its `next` valid for a reader that stands on it (include/linux/rculist.h)."""
    _unlink(entry)
    entry.prev = LIST_POISON2


def list_empty(head: Any) -> bool:
    """Nothing is linked to `head`."""
    return bool(head.next == head.address_)


def list_is_singular(head: Any) -> bool:
    """Exactly one entry is linked to `head`."""
    return not list_empty(head) and head.next == head.prev


def _add_between(new: Any, before: Any, after: Any) -> None:
    after.prev = new.address_
    new.next = after.address_
    new.prev = before.address_
    before.next = new.address_


def _unlink(entry: Any) -> None:
    before, after = _at(entry, entry.prev), _at(entry, entry.next)
    after.prev = before.address_
    before.next = after.address_


def _at(near: Any, address: int) -> Any:
    return near.layouts_.view("list_head", near.memory_, address)
