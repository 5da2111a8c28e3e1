"""Gives cuBLAS's workspaces back when the last engine of this process that used them goes."""

from __future__ import annotations

import weakref

import torch


class Workspaces:
    """cuBLAS keeps a workspace for every stream it was used on, 32 MiB each on Hopper, until the process ends, and
    can only clear all of them at once. So they are cleared when the last model goes: the captured graphs of an
    engine that is still alive hold the addresses of theirs. They return to PyTorch's pool, which
    `ModelRunner.close` then empties.

    One object serves a process, because cuBLAS has one set of workspaces per process: `GpuRunner.workspaces`.
    """

    def __init__(self) -> None:
        self._users: set[object] = set()

    def keep_for(self, model: torch.nn.Module) -> None:
        """Keeps the workspaces at least as long as `model` lives."""
        user = object()
        self._users.add(user)
        # not at exit: the driver may be gone by then
        weakref.finalize(model, self._forget, user).atexit = False

    def _forget(self, user: object) -> None:
        self._users.discard(user)
        if not self._users:
            torch._C._cuda_clearCublasWorkspaces()
