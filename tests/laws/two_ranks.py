"""What each of several processes does for `test_law_equality.py`: one group is started for all methods."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    from dgm_models.training.runtime import Runtime
    from tests.laws import test_law_equality as law

    runtime = Runtime.of_process_group(torch.device("cpu"))
    if world == 2:
        methods_and_facts(runtime, Path(folder))
    torch.save(law.long_runs(runtime, Path(folder)), Path(folder, f"long-{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def methods_and_facts(runtime: object, folder: Path) -> None:
    from dgm_models.training.runtime import Runtime
    from tests.laws import cases
    from tests.laws import test_law_equality as law

    assert isinstance(runtime, Runtime)
    rank = runtime.rank
    for case in cases.CASES:
        trainer = law.run(case, runtime=runtime)
        reached = cases.state_of(trainer) | {"metrics": law.reported(trainer)}
        torch.save(reached, folder / f"{law.slug(case)}-{rank}")
    facts = {
        "gathered": runtime.gather(torch.arange(3.0)[: 3 * rank] + 10 * rank),  # rank 0 has no row
        "coupled": law.coupled(runtime),
        "disagree": law.disagreement(runtime, own=(0, 1)),
        "exchanged": law.disagreement(runtime, own=(rank,)),
        "unequal": law.disagreement(runtime, own=(0,) if rank else (0, 1)),
        "unequal in small buckets": law.disagreement(runtime, own=(0,) if rank else (0, 1), limit=1),
    }
    torch.save(facts, folder / f"facts-{rank}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
