#!/usr/bin/env bash
# Guess: a placement group, one of whose bundles names its node by a label, comes about at once where all nodes are free.
# What Ray does: it may give that node to another bundle first, and then tries again by and by: for up to half a minute.
# It does not where the other bundles' labels rule that node out.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
RAY_USAGE_STATS_ENABLED=0 "$place/venv/bin/python" <<'PYTHON'
import time
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, remove_placement_group

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
cluster.add_node(num_cpus=3)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
own = ray.get_runtime_context().get_node_id()


def seconds(other):
    began = time.monotonic()
    labels = [{"ray.io/node-id": own}, other]
    group = placement_group([{"CPU": 1}, {"CPU": 2}], strategy="STRICT_SPREAD", bundle_label_selector=labels)
    assert group.wait(90)
    took = time.monotonic() - began
    remove_placement_group(group)
    return took


named_alone = [seconds({}) for _ in range(8)]
both = [seconds({"ray.io/node-id": f"!{own}"}) for _ in range(8)]
print("ray", ray.__version__)
print("seconds until placed, one bundle with a label:", *(f"{each:.2f}" for each in named_alone))
print("the other one's label rules that node out:    ", *(f"{each:.2f}" for each in both))
ray.shutdown()
cluster.shutdown()
assert max(named_alone) > max(1.5, 2 * max(both)), "it is placed at once: this is no finding any more"
PYTHON
