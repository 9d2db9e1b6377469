"""One network in its own process and environment, called for one pair at a time: ``python peer_worker.py SETTINGS``.

It also runs in environments without flowreel, so it imports nothing of this project at module level. SETTINGS is JSON:
``kind`` (a key of ``NETWORKS``), ``model``, ``weights`` (safetensors with NVIDIA's keys), ``precision``, ``threads``,
``frames`` (a .npy, (2, 3, H, W) float32 RGB 0..255). Once everything is loaded it prints ``ready``. Then it answers
each line on stdin with one line: ``run`` computes a pair and answers with the seconds; a path saves the last flow
there, (2, H, W) float32, and answers with the process's peak memory in bytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or an idle peer would spin while another is timed

import numpy as np
import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
IN_PTLFLOW = {"FlowNet2": "flownet2", "FlowNet2C": "flownetc", "FlowNet2S": "flownets"}


def compiled(settings: dict[str, Any], shape: tuple[int, int, int]) -> Network:
    """The form that the engine runs."""
    import flowreel

    model = flowreel.load_model(settings["model"], weights=settings["weights"])
    fast = flowreel.compile(model, shape, settings["precision"])
    return lambda first, second: fast(first, second)  # without a reference to the model: it is freed, as in the engine


def plain(settings: dict[str, Any], shape: tuple[int, int, int]) -> Network:
    """The same network as a torch module, with this project's kernels."""
    import flowreel

    network: Network = flowreel.load_model(settings["model"], weights=settings["weights"]).eval()
    return network


def ptlflow(settings: dict[str, Any], shape: tuple[int, int, int]) -> Network:
    """ptlflow's version of the model, with our weights. It takes BGR, 0..1."""
    try:
        import ptlflow
    except RuntimeError:  # a torchvision built for another torch: only its operators' declarations are missing
        declared = torch.library.Library("torchvision", "FRAGMENT")
        declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_declared"] = declared  # the declarations last as long as this object
        for name in [name for name in sys.modules if name.split(".")[0] in ("ptlflow", "timm", "torchvision")]:
            del sys.modules[name]
        import ptlflow
    from safetensors.torch import load_file

    model = ptlflow.get_model(IN_PTLFLOW[settings["model"]]).eval()
    model.load_state_dict(load_file(settings["weights"]))

    def network(first: Tensor, second: Tensor) -> Tensor:
        images = torch.stack((first, second), 1).flip(2) / 255
        flow: Tensor = model({"images": images})["flows"][:, 0]
        return flow

    return network


NETWORKS = {"compiled": compiled, "plain": plain, "ptlflow": ptlflow}


def peak_bytes() -> int:
    """This process's peak memory. Not from ``ru_maxrss`` on Linux, which starts at the peak of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr, apart from the answers
    torch.set_num_threads(settings["threads"])
    frames = torch.from_numpy(np.load(settings["frames"]))
    network = NETWORKS[settings["kind"]](settings, (1, *frames.shape[2:]))
    flow = torch.empty(0)
    print("ready", file=answers)
    for line in sys.stdin:
        if line.strip() == "run":
            began_s = time.perf_counter()
            with torch.inference_mode():
                flow = network(*frames[:, None])
            print(time.perf_counter() - began_s, file=answers)
        else:
            np.save(line.strip(), flow[0].numpy())
            print(peak_bytes(), file=answers)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
