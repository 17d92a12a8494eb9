"""Several devices of one node train together: each works out its share of a batch's gradient, and rank 0 adds them.

    rank 0, the training process ──parameters, rows──► rank 1, 2, …    one process for each further device
                                 ◄──────gradients────

Rank 0 alone has the optimiser and the strategy, so every one of them works as on one device. The gradients are summed
by `torch.distributed`: NCCL between GPUs, else gloo on this machine's own interface. Control goes through pipes, which
also end a rank whose rank 0 is gone.
"""

import contextlib
import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from concord_client.devices import prepare_process
from concord_shared.errors import ConcordError
from concord_shared.plan.schema import Plan, parse_plan_document

__all__ = ["RankLostError", "Ranks"]

TIMEOUT_S = 600.0
"""For the others, at each step. A rank that was killed is noticed at once; this is for one that hangs."""


class RankLostError(ConcordError):
    """One of the processes that train together ended, or hangs."""


@dataclass
class _Rank:
    device: str
    process: "subprocess.Popen[bytes]"

    def tell(self, work: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return dict(json.loads(line))


class Ranks:
    """Rank 0's side. devices: of all ranks, its own first. `close` ends the others."""

    def __init__(self, plan: Plan, devices: Sequence[str], threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="concord-ranks-")
        self._others: list[_Rank] = []
        self._group: Any = None
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        backend = "nccl" if all(each.startswith("cuda") for each in devices) else "gloo"
        work = {
            "plan": plan.document(),
            "folder": self._folder.name,
            "world": len(devices),
            "backend": backend,
            "threads": max(1, threads // len(devices)),
        }
        try:
            for number, device in enumerate(devices[1:], 1):
                self._others.append(_start(device, work | {"rank": number, "device": device}))
            for rank in self._others:
                if problem := rank.hear().get("failed"):
                    raise RankLostError(f"the process for {rank.device} did not start: {problem}")
            self._group = _join(self._folder.name, 0, len(devices), backend, devices[0])
        except (EOFError, OSError, RuntimeError) as error:
            raise self._lost(error) from error
        except BaseException:
            self.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        return [each.process.pid for each in self._others]

    def hand_out(
        self, parameters: Sequence[nn.Parameter], inputs: Tensor, targets: Tensor, size: int, whole: float, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Gives each other rank its share of a batch and the parameters as they are; returns rank 0's own share.

        size: of the parts that each takes its share in. whole: what the batch's mean loss is a mean of.
        """
        if self._group is None:
            raise RankLostError("the processes that train together have ended; they begin anew with the next process")
        shares = list(zip(*(each.tensor_split(len(self._others) + 1) for each in (inputs, targets)), strict=True))
        if self._down is None:
            self._down, self._up = _room_for(parameters), _room_for(parameters)
        torch.cat([each.detach().reshape(-1) for each in parameters], out=self._down)
        try:
            for rank, share in zip(self._others, shares[1:], strict=True):
                tensors = [{"shape": list(each.shape), "dtype": str(each.dtype).split(".")[1]} for each in share]
                rank.tell({"tensors": tensors, "size": size, "whole": whole, "scale": scale})
            self._group.broadcast(self._down, 0).wait()
            for number, share in enumerate(shares[1:], 1):
                for each in share:
                    if each.numel():
                        self._group.send([each.contiguous()], number, 0).wait()
        except (EOFError, OSError, RuntimeError) as error:
            raise self._lost(error) from error
        return shares[0]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds the others' gradients to those of rank 0.

        Raises:
            RuntimeError: another rank failed, with its words, such as that memory is out.
            RankLostError: one ended.
        """
        assert self._up is not None
        _gather(parameters, self._up)
        try:
            self._group.reduce(self._up, 0).wait()
            heard = [rank.hear() for rank in self._others]
        except (EOFError, OSError, RuntimeError, ValueError) as error:
            raise self._lost(error) from error
        if failed := [each["failed"] for each in heard if each.get("failed")]:
            raise RuntimeError(failed[0])
        for parameter, summed in zip(parameters, _parts(self._up, parameters), strict=True):
            parameter.grad = summed.clone()

    def close(self) -> None:
        for rank in self._others:
            rank.process.kill()
            rank.process.wait()
            for pipe in (rank.process.stdin, rank.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._others = []
        self._group = None
        self._folder.cleanup()

    def _lost(self, error: Exception) -> RankLostError:
        ended = []
        for rank in self._others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended.append(f"{rank.device} (exit code {rank.process.wait(1)})")
        self.close()
        what = f"ended: {', '.join(ended)}" if ended else f"did not answer within {TIMEOUT_S:.0f} s"
        return RankLostError(
            f"of the processes that train together on resources.devices, one {what}. The round is lost, nothing else; "
            f"this node's log says more ({type(error).__name__})"
        )


def _start(device: str, work: dict[str, Any]) -> _Rank:
    process = subprocess.Popen(
        [sys.executable, "-m", "concord_client.ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(work["threads"])},
    )
    rank = _Rank(device, process)
    rank.tell(work)
    return rank


def _join(folder: str, rank: int, world: int, backend: str, device: str) -> Any:
    """Its process group, on this machine's own interface, with a store in a folder that only this user can read. Not
    the process's default one: a node keeps more than one plan at hand.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", _loopback())
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    store = dist.FileStore(str(Path(folder) / "store"), world)  # type: ignore[attr-defined]
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, world, options)
    return dist.ProcessGroupGloo(store, rank, world, timeout)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def _room_for(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Room for all of them, `(d,)`, where they are."""
    return torch.empty(sum(each.numel() for each in parameters), device=parameters[0].device)


def _gather(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Their gradients into `flat`, which takes no more memory; nothing of those that have none."""
    for parameter, place in zip(parameters, _parts(flat, parameters), strict=True):
        if parameter.grad is None:
            place.zero_()
        else:
            place.copy_(parameter.grad)


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [each.numel() for each in like]
    return [part.view_as(each) for part, each in zip(torch.split(flat, sizes), like, strict=True)]


# A further rank's side


def _serve(requests: "IO[bytes]", answers: "IO[bytes]") -> None:
    """The life of a further rank: a share of each batch, until rank 0's pipe closes."""
    from concord_client.trainer import Workbench

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    first = json.loads(requests.readline())
    prepare_process(first["threads"])
    try:
        device = torch.device(first["device"])
        bench = Workbench(parse_plan_document(first["plan"]), device)
    except Exception as error:
        tell({"failed": f"{type(error).__name__}: {error}"})
        return
    tell({})
    group = _join(first["folder"], first["rank"], first["world"], first["backend"], first["device"])
    parameters = bench.trained()
    torch.manual_seed(first["rank"])  # of dropout
    flat, gradients = _room_for(parameters), _room_for(parameters)
    bench.model.train()
    while line := requests.readline():
        work = json.loads(line)
        group.broadcast(flat, 0).wait()
        with torch.no_grad():
            for parameter, value in zip(parameters, _parts(flat, parameters), strict=True):
                parameter.copy_(value)
        share = [
            torch.empty(each["shape"], dtype=getattr(torch, each["dtype"]), device=device) for each in work["tensors"]
        ]
        for each in share:
            if each.numel():
                group.recv([each], 0, 0).wait()
        failed = ""
        try:
            bench.add_share(share[0], share[1], work["size"], work["whole"], work["scale"])
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        _gather(parameters, gradients)
        group.reduce(gradients, 0).wait()
        tell({"failed": failed})
        bench.model.zero_grad(set_to_none=True)
    shutil.rmtree(first["folder"], ignore_errors=True)  # where rank 0 was killed, it could not


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as to_rank_0:
        os.dup2(2, 1)  # what others print goes to the log
        try:
            _serve(sys.stdin.buffer, to_rank_0)
        except BrokenPipeError:  # rank 0 is gone
            sys.exit(0)
        except RuntimeError as error:
            sys.exit(f"a process that trains together with others ended: {error}")
