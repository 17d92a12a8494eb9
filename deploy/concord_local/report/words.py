"""What things are called, as (English, Chinese) pairs, and a plan told in plain words."""

from collections.abc import Mapping
from typing import Any

from concord_local.report.reading import Run
from concord_shared.model_card import own_model
from concord_shared.plan.privacy import Robust
from concord_shared.plan.schema import Plan

__all__ = ["FIGURES", "REASONS", "STEPS", "Words", "own_model_in_words", "plan_in_words"]

Words = tuple[str, str]

FIGURES: Mapping[str, Words] = {
    "accuracy": ("accuracy", "准确率"),
    "recall_macro": ("recall (macro)", "召回率（宏平均）"),
    "precision_macro": ("precision (macro)", "精确率（宏平均）"),
    "f1_macro": ("F1 (macro)", "F1（宏平均）"),
    "auc": ("AUC", "AUC"),
    "loss": ("loss", "损失"),
    "perplexity": ("perplexity", "困惑度"),
    "tokens": ("tokens", "词元数"),
    "rmse": ("RMSE", "均方根误差 RMSE"),
    "mae": ("MAE", "平均绝对误差 MAE"),
    "r2": ("R²", "决定系数 R²"),
    "hit_rate_10": ("hits in the first 10", "前 10 命中率"),
    "ndcg_10": ("NDCG@10", "NDCG@10"),
}

STEPS: Mapping[str, Words] = {
    "statistics": ("statistics", "统计"),
    "train": ("training", "训练"),
    "evaluate": ("evaluation", "评估"),
}

REASONS: Mapping[str, Words] = {
    "far": ("far from the result", "远离结果"),
    "long": ("longer than the others’", "比其他更新长"),
    "short": ("shorter than the others’", "比其他更新短"),
    "against": ("another direction", "方向不同"),
}

RULES: Mapping[str, Words] = {
    "nnm-trimmed-mean": ("nearest-neighbour mixing and the trimmed mean", "最近邻混合加截尾均值"),
    "trimmed-mean": ("the trimmed mean", "截尾均值"),
    "median": ("the median of each coordinate", "逐坐标中位数"),
    "clipped-mean": ("the mean of Updates clipped to their median length", "截断至中位长度后的均值"),
}

STRATEGIES: Mapping[str, Words] = {
    "fedavg": ("the weighted mean of the nodes’ Updates", "对各节点的更新取加权平均"),
    "fedavgm": ("the weighted mean of the nodes’ Updates, with momentum", "对各节点的更新取加权平均，并带动量"),
    "fedprox": (
        "the weighted mean of the nodes’ Updates; each node is held near the shared model",
        "对各节点的更新取加权平均；训练时约束各节点不偏离共享模型太远",
    ),
    "fedadam": ("the mean Update drives an adaptive (Adam) step", "以平均更新驱动自适应（Adam）步进"),
    "fedyogi": ("the mean Update drives an adaptive (Yogi) step", "以平均更新驱动自适应（Yogi）步进"),
    "fedadagrad": ("the mean Update drives an adaptive (Adagrad) step", "以平均更新驱动自适应（Adagrad）步进"),
    "fednova": (
        "the weighted mean of what the nodes’ Updates are worth a step, so that more steps are no more weight",
        "按每步折算后取各节点更新的加权平均，步数多的节点不多占权重",
    ),
    "scaffold": (
        "the weighted mean of the nodes’ Updates, whose drift control variates take out",
        "对各节点的更新取加权平均，并以控制变量消除本地漂移",
    ),
    "fedbn": (
        "the weighted mean of the nodes’ Updates; normalisation layers stay at their node",
        "对各节点的更新取加权平均；归一化层留在各节点",
    ),
    "ditto": (
        "the weighted mean of the nodes’ Updates; each node also has a model of its own near the shared one",
        "对各节点的更新取加权平均；各节点另有一个贴近共享模型的自有模型",
    ),
    "fedrep": (
        "the weighted mean of the nodes’ Updates of the body; each node has a head of its own",
        "对各节点主干部分的更新取加权平均；各节点有自己的头部",
    ),
    "least-squares": (
        "the exact solution of linear regression, from the nodes’ summed moments",
        "由各节点矩之和直接求得线性回归的精确解",
    ),
}

PARTITIONS: Mapping[str, Words] = {
    "iid": ("shuffled, equal counts at every node", "随机打乱，各节点行数相等"),
    "dirichlet": ("classes spread unevenly over nodes, Dirichlet({0})", "各类别在节点间不均匀分布，Dirichlet({0})"),
    "shards": ("sorted by class, {0} shards at each node", "按类别排序切片，每个节点 {0} 片"),
    "quantity": ("shuffled, uneven counts, Dirichlet({0})", "随机打乱，行数不均，Dirichlet({0})"),
    "natural": ("as the data itself says: one node for each {0}", "按数据本身划分：每个 {0} 一个节点"),
    "grouped": ("all rows of a {0} at one node, equal counts of them", "同一 {0} 的所有行在同一节点，各节点数量相等"),
    "directory": ("one node for each directory", "每个目录一个节点"),
}

OPTIMISERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


def plan_in_words(run: Run) -> list[tuple[Words, Words]]:
    """(term, explanation) pairs: what ran, for people who don't read plans."""
    plan = run.plan
    told = [
        (("Task", "任务"), _task(plan)),
        (("Data", "数据"), _data(run)),
        (("Model", "模型"), _model(plan)),
        (("Preparation of inputs", "输入预处理"), _preparation(plan)),
        (("At the nodes", "节点本地训练"), _local_work(plan)),
        (("At the coordinator", "协调方聚合"), _strategy(plan)),
        (("Rounds", "轮次"), _rounds(plan)),
        (("Evaluation", "评估"), _evaluation(run)),
    ]
    faults = str(run.setting.get("faults") or "")
    if faults:
        told.append((("Faults on purpose", "故意注入的故障"), (faults, faults)))
    if isinstance(plan.privacy, Robust):
        told.append((("Robust against", "稳健性"), _robust(plan.privacy)))
    if attack := run.summary.get("attack"):
        nodes = ", ".join(attack["nodes"])
        told.append((("Attack on purpose", "故意发起的攻击"), (f"{attack['kind']}: {nodes}",) * 2))
    return told


def own_model_in_words(plan: Plan) -> Words:
    """What a node's own model is, in a run whose figures are of these."""
    whole = plan.strategy.name == "ditto"
    return own_model(plan), "贴近共享模型、留在该节点的完整模型" if whole else "共享部分加上留在该节点的部分"


def _robust(privacy: Robust) -> Words:
    english, chinese = RULES[privacy.rule]
    return (
        f"{_plural(privacy.attackers, 'attacker')}, by {english}; every node counts the same ({privacy.rule})",
        f"{privacy.attackers} 个攻击者，方法为{chinese}；每个节点权重相同（{privacy.rule}）",
    )


def _task(plan: Plan) -> Words:
    data = plan.data
    count = len(data.columns)
    shape = " × ".join(map(str, data.shape))
    source = {
        "image": (f"images of {shape}", f"{shape} 图像"),
        "table": (f"{count} columns", f"{count} 列"),
        "text": ("text", "文本"),
        "array": (f"arrays of {shape}", f"{shape} 数组"),
        "ratings": (f"ratings of {len(data.items)} items", f"对 {len(data.items)} 个物品的评分"),
    }[data.input]
    if data.task == "own":
        return f"answer as the model's wheel says, from {source[0]}", f"由{source[1]}给出模型所在 wheel 定义的答案"
    if data.task == "ranking":
        return (
            f"tell which “{data.item}” a user takes next, from {source[0]}",
            f"由{source[1]}预测用户接下来选择的“{data.item}”",
        )
    if data.task == "regression":
        return f"predict the number “{data.target}” from {source[0]}", f"由 {source[1]}预测数值“{data.target}”"
    if data.task == "language-model":
        return "tell the next token of a text", "预测文本的下一个词元"
    classes = len(data.classes)
    return (
        f"predict “{data.target}”, one of {classes} classes, from {source[0]}",
        f"由 {source[1]}预测“{data.target}”，共 {classes} 类",
    )


def _data(run: Run) -> Words:
    source = str(run.setting.get("data", "–"))
    name, _, value = str(run.setting.get("partition", "")).partition(":")
    english, chinese = (text.format(value) for text in PARTITIONS.get(name, ("{0}", "{0}")))
    return f"{source}; {english}", f"{source}；{chinese}"


def _model(plan: Plan) -> Words:
    hidden: tuple[int, ...] = getattr(plan.model, "hidden", ())
    if not hidden:
        return plan.model.name, plan.model.name
    layers = ", ".join(map(str, hidden))
    return f"{plan.model.name}, hidden layers of {layers}", f"{plan.model.name}，隐藏层 {layers}"


def _preparation(plan: Plan) -> Words:
    chosen = plan.preprocessing
    english = {
        "federated": "fitted across all nodes from exact sums, never from pooled rows",
        "per-node": "each node fits its own",
        "none": "nothing is fitted",
    }[chosen.scope]
    chinese = {
        "federated": "由各节点的精确总和共同拟合，不汇集原始行",
        "per-node": "各节点自行拟合",
        "none": "无需拟合",
    }[chosen.scope]
    steps = {
        ("numbers standardised", "数值标准化"): chosen.standardise,
        ("numbers between their smallest and largest", "数值按最小值和最大值缩放"): chosen.normalise == "min-max",
        ("numbers by median and quartiles", "数值按中位数和四分位数缩放"): chosen.normalise == "robust",
        ("values outside of the contract are missing", "合约范围外的值视为缺失"): chosen.outside == "missing",
        ("outliers moved to fences", "离群值移至界限"): chosen.outliers is not None,
        ("missing values filled in", "缺失值填补"): chosen.missing == "impute",
        ("duplicates dropped", "去除重复行"): chosen.duplicates == "drop",
        ("noisy images filtered", "噪声图像中值滤波"): chosen.denoise != "none",
        ("training images moved", "训练图像增强"): chosen.augment is not None,
        ("hashed characters", "字符哈希"): chosen.text is not None,
    }
    chosen_steps = [words for words, is_on in steps.items() if is_on]
    return (
        "; ".join([english, *(step for step, _ in chosen_steps)]),
        "；".join([chinese, *(step for _, step in chosen_steps)]),
    )


def _local_work(plan: Plan) -> Words:
    if plan.strategy.name == "least-squares":
        return "sums of products of the columns (moments), no optimiser", "计算各列乘积之和（矩），不使用优化器"
    work = plan.training
    optimiser = f"{OPTIMISERS[work.optimiser]}, learning rate {work.learning_rate:g}"
    chinese = f"{OPTIMISERS[work.optimiser]}，学习率 {work.learning_rate:g}"
    if work.momentum:
        optimiser, chinese = f"{optimiser}, momentum {work.momentum:g}", f"{chinese}，动量 {work.momentum:g}"
    if work.schedule != "constant":
        optimiser, chinese = f"{optimiser} ({work.schedule})", f"{chinese}（{work.schedule}）"
    amount = (_plural(work.local_epochs, "epoch"), f"{work.local_epochs} 个周期")
    if work.local_steps:
        amount = (_plural(work.local_steps, "step"), f"{work.local_steps} 步")
    if work.local_seconds:
        amount = (f"{amount[0]}, {work.local_seconds:g} s at most,", f"{amount[1]}（至多 {work.local_seconds:g} 秒）")
    size = f"{100 * work.batch_share:.3g} %" if work.batch_share else str(work.batch_size)
    return (
        f"{amount[0]} a round over the node’s own rows, {size} at a time; {optimiser}",
        f"每轮在本节点数据上训练 {amount[1]}，批大小 {size}；{chinese}",
    )


def _strategy(plan: Plan) -> Words:
    name = plan.strategy.name
    options = plan.strategy.model_dump(exclude={"name"})
    details = ", ".join(f"{key} = {value:g}" for key, value in options.items())
    english, chinese = STRATEGIES[name]
    tail = f" ({name}{', ' + details if details else ''})"
    return english + tail, chinese + tail


def _rounds(plan: Plan) -> Words:
    rounds = plan.rounds
    asked, answers = _share(rounds.cohort), _share(rounds.quorum)
    weights = (f"no node weighs more than {rounds.weight_cap} rows", f"单个节点至多按 {rounds.weight_cap} 行计权")
    if plan.privacy.dp:
        weights = ("all nodes weigh the same", "所有节点权重相同")
    return (
        f"{rounds.count}; asked in each: {asked[0]}; needed for a result: {answers[0]} of those asked; {weights[0]}",
        f"{rounds.count} 轮；每轮邀请：{asked[1]}；有效所需应答：受邀节点的 {answers[1]}；{weights[1]}",
    )


def _evaluation(run: Run) -> Words:
    rows = {"test": ("test", "测试"), "validation": ("validation", "验证")}[run.plan.evaluation.on]
    every = run.plan.evaluation.every
    own = (" with its own model", "用自己的模型") if run.personal else ("", "")
    english = (
        "after the last round" if every == 0 else "after every round" if every == 1 else f"after every {every} rounds"
    )
    chinese = "最后一轮之后" if every == 0 else "每轮之后" if every == 1 else f"每 {every} 轮之后"
    return (
        f"{english}, at every node{own[0]} on its own {rows[0]} rows",
        f"{chinese}，各节点{own[1]}在自己的{rows[1]}行上评估",
    )


def _share(share: Any) -> Words:
    if share == "all":
        return "all", "全部"
    if isinstance(share, float):
        return f"{100 * share:g}%", f"{100 * share:g}%"
    return str(share), f"{share} 个"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
