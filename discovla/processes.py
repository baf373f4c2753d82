"""The processes of a run: joined, watched and left together, and one that alone writes the run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from discovla.config import RunConfig
from discovla.engine.checkpoint import CheckpointWriter
from discovla.engine.distributed import World, gather_objects, join_world, leave_world
from discovla.engine.lifecycle.heartbeat import GRACE, Heartbeat
from discovla.engine.lifecycle.peers import Peers
from discovla.engine.lifecycle.signals import StopSignals
from discovla.errors import PeerLost, RunStopped, exit_process, is_connection_lost
from discovla.lock import LockHeld, WriterLock

WRITE_SECONDS = 60.0  # for a checkpoint in writing to be completed before a lost peer ends this process


@contextmanager
def joined_processes(
    config: RunConfig, signals: StopSignals, writer: CheckpointWriter
) -> Iterator[tuple[World, str]]:
    """Join the processes of a run, watch them, and leave; yields the world and the name of this process.

    A lost peer ends this process, or is raised as PeerLost if the main thread notices it first. After an
    error the process group and the heartbeat's connections stay open: a rank that waits in a collective is
    then ended by the launcher, not by a lost connection before this rank has printed its message.
    """
    heartbeat: Heartbeat | None = None

    def start_heartbeat(world: World, peers: Peers) -> None:
        nonlocal heartbeat
        on_lost = partial(exit_process, before_exit=partial(writer.finish_within, WRITE_SECONDS))
        heartbeat = Heartbeat(world, peers, timeout=config.engine.heartbeat_timeout, on_lost=on_lost)

    try:
        world = join_world(
            config.engine.device,
            rendezvous_timeout=config.engine.rendezvous_timeout,
            on_peers=start_heartbeat,
        )
        with signals, naming(config.directory):
            yield world, "the only rank" if heartbeat is None else str(heartbeat.members[world.rank])
            if heartbeat is not None:
                heartbeat.close()
            leave_world()
    except RuntimeError as error:
        if heartbeat is not None and (heartbeat.lost is not None or is_connection_lost(error)):
            lost = heartbeat.wait_for_loss(GRACE)
            if lost is not None:
                raise PeerLost(f"{lost}; resume=true continues from the newest checkpoint") from error
        raise
    finally:
        if heartbeat is not None:
            heartbeat.disarm()


@contextmanager
def sole_writer(directory: Path, world: World, signals: StopSignals) -> Iterator[WriterLock | None]:
    """Lock the run directory; yields the lock on the first rank, which alone writes there.

    Raises:
        LockHeld: on every rank, if another run writes there.
    """
    lock, failure = None, None

    def obey_signals() -> None:
        if any(signals.counts()):
            raise RunStopped(f"stopped while another writer of {directory} was watched")

    if world.first:
        lock = WriterLock(
            directory,
            "run",
            on_lost=partial(exit_process, before_exit=lambda: None),
            on_wait=obey_signals,
        )
        try:
            lock.acquire()
        except (LockHeld, RunStopped, OSError) as error:
            failure = error
    failure = gather_objects(failure, world)[0]
    if failure is not None:
        raise failure
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def naming(directory: Path) -> Iterator[None]:
    """Name the run directory in an OSError that names no file, as a full disk raises."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(directory)) from error
