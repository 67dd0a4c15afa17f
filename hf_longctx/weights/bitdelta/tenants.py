"""Many fine-tunes of one base in one model: who there is, who is on the device, and whose row is whose."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .checkpoint import end_names
from .embeddings import Table
from .family import families
from .fit import Known, check
from .format import Delta
from .head import Head
from .hooks import Hook
from .message import say
from .places import Place, places_of
from .route import BASE, Route
from .signs import Signs
from .split import Part, check_split, part_of
from .tables import Norm

_KEPT = 64
"""Routes that are remembered: a service has other names in every batch."""


class Deltas:
    """The tenants of one model.

    Attributes:
        model: the base, whose layers carry hooks.
        slots: tenants that are on the device at a time.
        tenants: all, in host memory.
        resident: the slot of each that is on the device; the least recently used first.
        active: whose rows are where a call names nobody; None: the base's.
        batch: rows of the call that is running.
    """

    def __init__(self, model: Any, decoder: Any, slots: int) -> None:
        self.model, self.decoder, self.slots = model, decoder, slots
        self.tenants: dict[str, Delta] = {}
        self.resident: OrderedDict[str, int] = OrderedDict()
        self.active: str | None = None
        self.batch = 1
        self.hooks: dict[str, Hook] = {}
        self.handles: list[Any] = []
        self._known = Known(model)
        self._calls: list[tuple[str, ...]] = []
        self._routes: dict[tuple[str, ...], Route] = {}
        self._read: list[Tensor] | None = None
        self._places: dict[str, dict[str, Place]] = {}
        self._first = end_names(model)[0].removesuffix(".weight")
        self._here = decoder.device, decoder.dtype

    # who there is

    def add(self, name: str, delta: Delta) -> None:
        """Register a tenant; onto the device it goes with its first call, or at once if a slot is free.

        Raises:
            ValueError: the name is taken or none, or the delta does not fit the model; nothing was changed.
        """
        if not name or name == BASE or name in self.tenants:
            raise ValueError(
                say("add_delta", f"a new name, not '{BASE}'", repr(name), "Choose another, or delete_delta")
            )
        check(name, delta, self._known)
        places = places_of(self.model, delta)
        whole = (Table, Head, Norm)
        signs = {key: (delta.matrices.get(f"{key}.weight"), place.kind in whole) for key, place in places.items()}
        check_split(f"delta '{name}'", self.model, signs)
        self._places[name], self.tenants[name] = places, delta
        try:
            if len(self.resident) < self.slots:
                self._place(name)
        except BaseException:
            self.resident.pop(name, None)
            del self._places[name], self.tenants[name]
            raise

    def delete(self, name: str) -> None:
        """Forget a tenant; its slot is free.

        Raises:
            ValueError: there is none of that name, or a call that is running has rows of it.
        """
        self.check([name])
        if any(name in names for names in self._calls):
            raise ValueError(say("delete_delta", "a tenant without running rows", name, "Wait for generate() to end"))
        if self.active == name:
            self.active = None
        slot = self.resident.pop(name, None)
        if slot is not None:
            for hook in self.hooks.values():
                hook.put(slot, {})
        del self.tenants[name], self._places[name]
        self._changed()

    def check(self, names: Iterable[str]) -> None:
        """Refuse names that nobody has.

        Raises:
            ValueError: with the names that there are.
        """
        unknown = sorted({str(name) for name in names if name != BASE and name not in self.tenants})
        if unknown:
            there = ", ".join([*self.tenants, BASE])
            raise ValueError(
                say("adapter_names", f"names among {there}", ", ".join(unknown), "Call model.add_delta first")
            )

    # whose rows are whose

    @contextmanager
    def calling(self, names: Iterable[str] | None) -> Iterator[None]:
        """Rows of the calls inside are of these tenants.

        Args:
            names: one for each row of the batch, `__base__` for the base; None: as it is.

        Raises:
            ValueError: an unknown name, or more tenants than slots; nothing was computed.
        """
        self.begin(names)
        try:
            yield
        finally:
            self.end()

    def begin(self, names: Iterable[str] | None) -> None:
        """As `calling`, until `end`."""
        chosen = self._names() if names is None else tuple(names)
        self.check(chosen)
        if not chosen:
            raise ValueError(
                say("adapter_names", "a name for each row", "none", "Leave adapter_names out for the base")
            )
        distinct = {name for name in chosen if name != BASE}
        if len(distinct) > self.slots:
            advice = "Load with slots=N, or make smaller batches"
            raise ValueError(say("adapter_names", f"at most {self.slots} tenants in a batch", len(distinct), advice))
        self._calls.append(chosen)

    def end(self) -> None:
        """What `begin` began is over."""
        self._calls.pop()

    def check_rows(self, tokens: Tensor) -> None:
        """Refuse a batch that the names do not fit, or with a token that a row's tenant does not have.

        Args:
            tokens: `[B, T]`, ids, or `[B, T, hidden]`, embeddings.

        Raises:
            ValueError: says which row.
        """
        names = self._names()
        if len(tokens) % len(names):
            got = f"{len(tokens)} rows for {len(names)} names"
            raise ValueError(
                say("adapter_names", "a name for each row of the batch", got, "Pass as many names as rows")
            )
        if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            return
        whole = len(self.model.get_input_embeddings().weight)
        sizes = [self._vocabulary(name, whole) for name in names]
        if len(set(sizes)) == 1 and sizes[0] == whole:
            return  # the base's own check holds
        for row, most in enumerate(tokens.amax(-1).tolist()):
            size = sizes[row * len(names) // len(tokens)]
            if most >= size:
                where = f"row {row} of '{names[row * len(names) // len(tokens)]}'"
                raise ValueError(say(where, f"tokens below {size}", most, "Use the tenant's own tokenizer"))

    def _vocabulary(self, name: str, whole: int) -> int:
        """Tokens that a tenant has."""
        own = None if name == BASE else self.tenants[name].dense.get(self._first + ".weight")
        return whole if own is None else len(own)

    def _names(self) -> tuple[str, ...]:
        """Whose rows those of the running call are."""
        return self._calls[-1] if self._calls else (self.active or BASE,)

    def route(self) -> Route | None:
        """Tenants of the rows of the running call; None: all rows are the base's."""
        names = self._names()
        distinct = {name for name in names if name != BASE}
        if not distinct:
            return None
        found = self._routes.get(names)
        if found is None:
            for name in distinct:
                self._place(name, distinct)
            slots = tuple(self.resident.get(name, -1) for name in names)
            planes = tuple(0 if name == BASE else self.tenants[name].planes for name in names)
            if len(self._routes) >= _KEPT:
                self._routes.clear()
            found = self._routes[names] = Route(names, slots, planes)
        return found

    def enter(self, rows: int) -> None:
        """Before the decoder runs: bring its tenants to where it is.

        Args:
            rows: of the batch.

        Raises:
            ValueError: the names do not fit the rows.
        """
        self._follow()
        self.batch, route = rows, self.route()
        if route is not None:
            route.check(rows)
            for name in route.names:
                if name in self.resident:
                    self.resident.move_to_end(name)

    # who is on the device

    def _place(self, name: str, keep: Iterable[str] = ()) -> None:
        """Bring a tenant to the device, in place of the one that was used least recently if need be."""
        if name in self.resident:
            return
        slot = next((n for n in range(self.slots) if n not in self.resident.values()), None)
        if slot is None:
            oldest = next(other for other in self.resident if other not in keep)
            slot = self.resident.pop(oldest)
            self._changed()
        parts = {key: place.load(self.tenants[name]) for key, place in self._places[name].items()}
        for key, own in parts.items():
            self._make(key, self._places[name][key], own)
        for key, hook in self.hooks.items():
            hook.put(slot, parts.get(key, {}))
        self.resident[name], self._read = slot, None

    def _make(self, key: str, place: Place, parts: Mapping[str, Any]) -> None:
        """A hook on a layer, with memory that a tenant fits into."""
        hook = self.hooks.get(key)
        if hook is not None and hook.takes(parts):
            return
        if hook is None:
            hook = self.hooks[key] = place.kind(self.model.get_submodule(key), self)
            families(self.hooks, key, Signs)
        hook.make(parts)
        self._changed()

    def parts(self, name: str, key: str) -> Mapping[str, Any]:
        """What a tenant has on a layer."""
        return self._places[name][key].load(self.tenants[name])

    def table(self) -> Table | None:
        """The hook on the input embeddings, if there is one."""
        found = self.hooks.get(self._first)
        return found if isinstance(found, Table) else None

    def part(self, module: nn.Module) -> Part | None:
        """As `Where.part`."""
        return part_of(self.model, next(name for name, own in self.model.named_modules() if own is module))

    def same(self) -> Route | None:
        """What calls have in common in which hooks do the same; a route holds until slots change."""
        return self.route()

    def buffers(self) -> list[Tensor]:
        """Tensors that hooks read in a call of one token a row."""
        route = self.route()
        made = [] if route is None else route.buffers(self.batch)
        self._read = self._read or [x for hook in self.hooks.values() for x in hook.buffers()]  # hundreds, in each step
        return [*made, *self._read]

    def _follow(self) -> None:
        """Begin anew on the device where the model is now, in its type."""
        here = self.decoder.device, self.decoder.dtype
        if here != self._here:
            for hook in self.hooks.values():
                hook.remove()
            self.hooks.clear()
            self.resident.clear()
            self._here = here
            self._changed()

    def _changed(self) -> None:
        """What was remembered of slots holds no more."""
        self._routes.clear()
        self._read = None

    def remove(self) -> None:
        """Take every hook off."""
        for hook in self.hooks.values():
            hook.remove()
        for handle in self.handles:
            handle.remove()

    @property
    def device_bytes(self) -> int:
        """Bytes on the device for all slots, filled or not."""
        return sum(hook.nbytes for hook in self.hooks.values())
