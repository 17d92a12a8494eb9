"""What differential privacy promises for a plan, and what it does not: one object, said alike to everybody.

It stands where a partner decides (`concord-node approvals show`), in a plan, in a run's summary and report, and on the
model's card. Texts are pairs: English, Chinese.
"""

from dataclasses import dataclass
from typing import Any

from concord_shared.plan.schema import Plan

__all__ = ["Guarantee", "guarantee_of"]

Words = tuple[str, str]

MECHANISMS: dict[str, Words] = {
    "dp-sgd": (
        "DP-SGD at each node: Poisson samples, each record's gradient clipped, Gaussian noise in every step",
        "各节点使用 DP-SGD：泊松抽样，逐条记录裁剪梯度，每一步加入高斯噪声",
    ),
    "tallies": (
        "discrete Gaussian noise that each node adds to every sum and count of its rows, as far as one record can move "
        "it",
        "各节点向其数据行的每个总和与计数加入离散高斯噪声，幅度按单条记录的最大影响确定",
    ),
    "distributed": (
        "discrete Gaussian noise that the nodes add to their Updates before masking, enough of it with the fewest "
        "survivors and with colluding nodes that add none",
        "各节点在加掩码之前向更新加入离散高斯噪声；即使存活节点最少、且合谋节点不加噪声，噪声仍然足够",
    ),
    "central": (
        "discrete Gaussian noise that the coordinator adds to the sum of the Updates",
        "协调方向更新之和加入离散高斯噪声",
    ),
}
AGAINST: dict[str, Words] = {
    "dp-sgd": (
        "everybody who sees what a node sends in training or the model: the coordinator, the other nodes, users",
        "任何看到节点训练时所发送内容或模型的人：协调方、其他节点、模型使用者",
    ),
    "tallies": (
        "everybody who sees what a node sends or what was found: the coordinator, the other nodes, readers",
        "任何看到节点所发送内容或统计结果的人：协调方、其他节点、读者",
    ),
    "distributed": (
        "everybody who sees the sums or the model: users, the other nodes, and the coordinator together with as many "
        "nodes as the plan reckons with, each node's own installation being honest",
        "任何看到总和或模型的人：模型使用者、其他节点，以及与计划所设数量的节点合谋的协调方（前提是其余节点的程序诚实）",
    ),
    "central": (
        "everybody who sees the models that are sent out; not the coordinator, which sees each node's Update",
        "任何看到所发布模型的人；不包括协调方——它能看到每个节点的更新",
    ),
}
NOT_COVERED: tuple[Words, ...] = (
    (
        "figures of evaluation: they are exact sums over test rows",
        "评估指标：它们是测试行的精确总和",
    ),
    (
        "the choice of plan or settings by such figures",
        "依据这些指标选择计划或参数的过程",
    ),
    (
        "the numbers of rows, and which nodes take part",
        "数据行数，以及哪些节点参与",
    ),
    (
        "other runs on the same data: what each of them costs adds up",
        "同一数据上的其他运行：各次的代价会累加",
    ),
    (
        "time taken, and other traces outside of messages",
        "耗时等消息之外的痕迹",
    ),
)
NOT_COVERED_OF: dict[str, tuple[Words, ...]] = {
    "record": (
        (
            "several records of one person, at one node or at several: then epsilon is that many times larger",
            "同一个人的多条记录（无论在一个还是多个节点）：ε 会按条数成倍增大",
        ),
        (
            "attacks on floating-point numbers: the noise is added before rounding to integers",
            "针对浮点数的攻击：噪声在取整之前加入",
        ),
    ),
    "node": (),
}
NOT_COVERED_OF_ROBUST: Words = (
    "how far each node's Update stands from the others, which is kept with the run for all who may see it",
    "各节点的更新与其他更新的偏离程度：它随运行记录保存，凡可查看该运行的人都能看到",
)


@dataclass(frozen=True)
class Guarantee:
    """unit: whose data are hidden. against: from whom."""

    unit: str
    epsilon: float
    delta: float
    clip: float
    mechanism: Words
    against: Words
    not_covered: tuple[Words, ...]

    @property
    def promise(self) -> Words:
        """In one sentence each."""
        what = {
            "record": ("one record more or less at a node", "某节点增减一条记录"),
            "node": ("all data of one node, there or not", "某节点全部数据的有无"),
        }[self.unit]
        return (
            f"Differential privacy: {what[0]} changes what can be concluded from the whole run by at most ε = "
            f"{self.epsilon:g}, but for a chance of δ = {self.delta:g}",
            f"差分隐私：{what[1]}对整个运行可得结论的影响不超过 ε = {self.epsilon:g}（例外概率 δ = {self.delta:g}）",
        )

    def sentences(self) -> list[str]:
        """In English, for a person who decides."""
        return [
            f"{self.promise[0]}.",
            f"How: {self.mechanism[0]}. Against: {self.against[0]}.",
            f"Not covered: {'; '.join(english for english, _ in self.not_covered)}.",
        ]

    def document(self) -> dict[str, Any]:
        """For summaries, as plain data."""
        return {
            "unit": self.unit,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "clip": self.clip,
            "mechanism": self.mechanism[0],
            "against": self.against[0],
            "not_covered": [english for english, _ in self.not_covered],
        }


def guarantee_of(plan: Plan) -> Guarantee | None:
    """None where the plan promises no differential privacy."""
    dp = plan.privacy.dp
    if dp is None:
        return None
    if plan.kind == "statistics":
        rest = (*NOT_COVERED[2:], NOT_COVERED_OF["record"][0])  # nothing is evaluated, and the noise is of integers
        return Guarantee(dp.unit, dp.epsilon, dp.delta, dp.clip, MECHANISMS["tallies"], AGAINST["tallies"], rest)
    exact = (NOT_COVERED_OF_ROBUST,) if plan.noise == "central" and plan.privacy.mode == "robust" else ()
    return Guarantee(
        dp.unit,
        dp.epsilon,
        dp.delta,
        dp.clip,
        MECHANISMS[plan.noise],
        AGAINST[plan.noise],
        (*NOT_COVERED, *NOT_COVERED_OF[dp.unit], *exact),
    )
