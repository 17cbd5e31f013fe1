"""The papers of the attacks, as BibTeX, and which of them a registered attack comes from."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import NamedTuple

from firstorder.attacks.distribution import DISTRIBUTION


class Paper(NamedTuple):
    """A publication.

    Attributes:
        authors: in full, with commas between them; a surname of several words is in braces.
        title: as printed; capitals in braces stay.
        venue: a conference, or a note on what it is instead.
        year: of the venue.
    """

    authors: str
    title: str
    venue: str
    year: int


PAPERS = {
    "andriushchenko2020square": Paper(
        "Maksym Andriushchenko, Francesco Croce, Nicolas Flammarion, Matthias Hein",
        "Square Attack: a query-efficient black-box adversarial attack via random search", "ECCV", 2020),
    "carlini2017evaluating": Paper(
        "Nicholas Carlini, David Wagner",
        "Towards Evaluating the Robustness of Neural Networks", "IEEE Symposium on Security and Privacy", 2017),
    "croce2020fab": Paper(
        "Francesco Croce, Matthias Hein",
        "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", "ICML", 2020),
    "croce2020reliable": Paper(
        "Francesco Croce, Matthias Hein",
        "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
        "ICML", 2020),
    "dabouei2022revisiting": Paper(
        "Ali Dabouei, Fariborz Taherkhani, Sobhan Soleymani, Nasser M. Nasrabadi",
        "Revisiting Outer Optimization in Adversarial Training", "ECCV", 2022),
    "dong2018boosting": Paper(
        "Yinpeng Dong, Fangzhou Liao, Tianyu Pang, Hang Su, Jun Zhu, Xiaolin Hu, Jianguo Li",
        "Boosting Adversarial Attacks with Momentum", "CVPR", 2018),
    "dong2019evading": Paper(
        "Yinpeng Dong, Tianyu Pang, Hang Su, Jun Zhu",
        "Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks", "CVPR", 2019),
    "ge2023boosting": Paper(
        "Zhijin Ge, Hongying Liu, Xiaosen Wang, Fanhua Shang, Yuanyuan Liu",
        "Boosting Adversarial Transferability by Achieving Flat Local Maxima", "NeurIPS", 2023),
    "goodfellow2015explaining": Paper(
        "Ian J. Goodfellow, Jonathon Shlens, Christian Szegedy",
        "Explaining and Harnessing Adversarial Examples", "ICLR", 2015),
    "kurakin2017adversarial": Paper(
        "Alexey Kurakin, Ian J. Goodfellow, Samy Bengio",
        "Adversarial examples in the physical world", "ICLR Workshop", 2017),
    "lin2020nesterov": Paper(
        "Jiadong Lin, Chuanbiao Song, Kun He, Liwei Wang, John E. Hopcroft",
        "Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks", "ICLR", 2020),
    "liu2020sharper": Paper(
        "Zhuanghua Liu, Ivor W. Tsang",
        "Towards Sharper First-Order Adversary with Quantized Gradients", "arXiv preprint", 2020),
    "liu2021selfadaptive": Paper(
        "Yanhong Liu, Fengming Cao",
        "Self-adaptive Norm Update for Faster Gradient-based {L2} Adversarial Attacks and Defenses",
        "SciTePress", 2021),
    "long2022frequency": Paper(
        "Yuyang Long, Qilong Zhang, Boheng Zeng, Lianli Gao, Xianglong Liu, Jian Zhang, Jingkuan Song",
        "Frequency Domain Model Augmentation for Adversarial Attack", "ECCV", 2022),
    "madry2018towards": Paper(
        "Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
        "Towards Deep Learning Models Resistant to Adversarial Attacks", "ICLR", 2018),
    "ngm2024provable": Paper(
        "Anonymous",
        "Provable convergence of clipped normalized-gradient heavy-ball momentum for adversarial attacks",
        "Submitted to ICLR", 2024),
    "rony2019decoupling": Paper(
        "Jérôme Rony, Luiz G. Hafemann, Luiz S. Oliveira, Ismail {Ben Ayed}, Robert Sabourin, Eric Granger",
        "Decoupling Direction and Norm for Efficient Gradient-Based {L2} Adversarial Attacks and Defenses",
        "CVPR", 2019),
    "tashiro2020diversity": Paper(
        "Yusuke Tashiro, Yang Song, Stefano Ermon",
        "Diversity can be Transferred: Output Diversification for White- and Black-box Attacks", "NeurIPS", 2020),
    "wang2021admix": Paper(
        "Xiaosen Wang, Xuanran He, Jingdong Wang, Kun He",
        "Admix: Enhancing the Transferability of Adversarial Attacks", "ICCV", 2021),
    "wang2021emi": Paper(
        "Xiaosen Wang, Jiadong Lin, Han Hu, Jingdong Wang, Kun He",
        "Boosting Adversarial Transferability through Enhanced Momentum", "BMVC", 2021),
    "wang2021enhancing": Paper(
        "Xiaosen Wang, Kun He",
        "Enhancing the Transferability of Adversarial Attacks through Variance Tuning", "CVPR", 2021),
    "wang2023structure": Paper(
        "Xiaosen Wang, Zeliang Zhang, Jianping Zhang",
        "Structure Invariant Transformation for better Adversarial Transferability", "ICCV", 2023),
    "wang2024boosting": Paper(
        "Kunyu Wang, Xuanran He, Wenxuan Wang, Xiaosen Wang",
        "Boosting Adversarial Transferability by Block Shuffle and Rotation", "CVPR", 2024),
    "xie2019improving": Paper(
        "Cihang Xie, Zhishuai Zhang, Yuyin Zhou, Song Bai, Jianyu Wang, Zhou Ren, Alan L. Yuille",
        "Improving Transferability of Adversarial Examples with Input Diversity", "CVPR", 2019),
    "xiong2022stochastic": Paper(
        "Yifeng Xiong, Jiadong Lin, Min Zhang, John E. Hopcroft, Kun He",
        "Stochastic Variance Reduced Ensemble Adversarial Attack for Boosting the Adversarial Transferability",
        "CVPR", 2022),
    "zheng2019distributionally": Paper(
        "Tianhang Zheng, Changyou Chen, Kui Ren", "Distributionally Adversarial Attack", "AAAI", 2019),
    "zou2020improving": Paper(
        "Junhua Zou, Zhisong Pan, Junyang Qiu, Xin Liu, Ting Rui, Wei Li",
        "Improving the Transferability of Adversarial Examples with Resized-Diverse-Inputs, Diversity-Ensemble and "
        "Region Fitting", "ECCV", 2020),
}  # fmt: skip

_NGM, _LIN, _QUANTISED = "ngm2024provable", "lin2020nesterov", "liu2020sharper"

ATTACKS: dict[str, tuple[str, ...]] = {
    "admix": ("wang2021admix",),
    "anu": ("liu2021selfadaptive",),
    "apgd": ("croce2020reliable",),
    "blob-qg": (_QUANTISED, "zheng2019distributionally"),
    "bsr": ("wang2024boosting",),
    "clipped-di-fgsm": ("xie2019improving", _NGM),
    "clipped-ng": (_NGM,),
    "clipped-ngm": (_NGM,),
    "clipped-si-dim": (_LIN, _NGM),
    "clipped-si-ti-dim": (_LIN, _NGM),
    "clipped-ti-dim": ("dong2019evading", _NGM),
    "clipped-sia-dim": ("wang2023structure", _NGM),
    "clipped-vmi-dim": ("wang2021enhancing", _NGM),
    "clipped-vmi-fgsm": ("wang2021enhancing", _NGM),
    "daa-blob": ("zheng2019distributionally", _QUANTISED),
    "ddn": ("rony2019decoupling",),
    "dem": ("zou2020improving",),
    "di-fgsm": ("xie2019improving",),
    "emi": ("wang2021emi",),
    "fgsm": ("goodfellow2015explaining",),
    "i-fgsm": ("kurakin2017adversarial",),
    "mi-fgsm": ("dong2018boosting",),
    "ngm": (_NGM,),
    "ni-fgsm": (_LIN,),
    "pgd": ("madry2018towards",),
    "pgn": ("ge2023boosting",),
    "pqgd": (_QUANTISED,),
    "si-ni-dim": (_LIN,),
    "si-ni-fgsm": (_LIN,),
    "si-ni-ti-dim": (_LIN,),
    "si-ni-tim": (_LIN,),
    "sia": ("wang2023structure",),
    "ssa": ("long2022frequency",),
    "svre": ("xiong2022stochastic",),
    "ti-dim": ("dong2019evading",),
    "ti-fgsm": ("dong2019evading",),
    "verdict": ("carlini2017evaluating", "tashiro2020diversity"),
    "vmi-fgsm": ("wang2021enhancing",),
    "vni-fgsm": ("wang2021enhancing",),
}
"""Of every attack of the registry that is ours, by its name there; the one it implements first."""

_ENGM, _ANU = "dabouei2022revisiting", "liu2021selfadaptive"

PLACES: dict[str, tuple[str, ...]] = {
    "AENGM": (_ENGM, "Eqs. 6, 7", "Alg. 1"),
    "ANU": (_ANU, "Alg. 2"),
    "AdaptiveRate": (_ANU, "Alg. 2"),
    "BLOBQG": (_QUANTISED, "Eqs. 8, 10, 11"),
    "BlobInteraction": (_QUANTISED, "Eq. 8"),
    "Clipped": (_NGM, "Alg. 1"),
    "ClippedNG": (_NGM, "Eq. 19"),
    "ClippedNGM": (_NGM, "Alg. 1"),
    "ClippedVMIFGSM": (_NGM, "App. A.2", "Alg. 2"),
    "DAABLOB": (_QUANTISED, "Eqs. 8-9"),
    "EMA": (_NGM, "Alg. 1"),
    "ENGM": (_ENGM, "Eqs. 5a, 5b"),
    "FENGM": (_ENGM, "Sec. 3.1"),
    "InverseSqrt": (_NGM, "Theorem 3.4"),
    "LookAhead": (_LIN, "Eq. 6"),
    "MGNC": (_ENGM, "Sec. 3.1"),
    "NENGM": (_ENGM, "Sec. 2.5", "Alg. 1"),
    "NGM": (_NGM, "Eq. 20"),
    "NIFGSM": (_LIN, "Eqs. 6-8"),
    "PQGD": (_QUANTISED, "Eqs. 4, 7"),
    "Quantised": (_QUANTISED, "Eq. 4"),
    "SINIDIM": (_LIN, "App. A", "Alg. 2"),
    "SINIFGSM": (_LIN, "Eqs. 6-9", "Alg. 1"),
    "SINITIDIM": (_LIN, "App. A", "Alg. 2"),
    "SINITIM": (_LIN, "App. A", "Alg. 2"),
    "SNGM": (_ENGM, "Eq. 4"),
    "ScaleCopies": (_LIN, "Eq. 9"),
}
"""Where the five papers that this package is about define what a class computes: the paper, and its equations,
algorithms and sections, as the class's `paper` or docstring names them.
"""

AUTOATTACK = {
    "apgd": "croce2020reliable",
    "fab": "croce2020fab",
    "square": "andriushchenko2020square",
    "AutoAttack": "croce2020reliable",
}
"""Of AutoAttack and its attacks, by what their names begin with."""


def keys(attack: str) -> tuple[str, ...]:
    """The papers of an attack, as a run calls it: a name of the registry, AutoAttack, or some of its attacks with "+"
    between; none for one that somebody else registered.
    """
    if attack.startswith("AutoAttack"):
        return tuple(dict.fromkeys(AUTOATTACK.values()))
    found = ATTACKS.get(attack, ())
    parts = () if found else attack.split("+")
    return found + tuple(dict.fromkeys(AUTOATTACK[own] for part in parts for own in AUTOATTACK if part.startswith(own)))


def bibtex(chosen: Iterable[str]) -> str:
    """Entries of BibTeX for keys of `PAPERS`, each once in the order given, and the entry of this package."""
    entries = [_entry(key, PAPERS[key]) for key in dict.fromkeys(chosen)]
    return "\n\n".join([*entries, package()]) + "\n"


def package() -> str:
    """The entry of this package, of the version that is installed."""
    fields = {
        "author": "{The firstorder authors}",
        "title": "{firstorder}: sharper first-order adversarial attacks",
        "note": f"Software, version {version(DISTRIBUTION)}",
    }
    return _written("misc", "firstorder", fields)


def _entry(key: str, paper: Paper) -> str:
    fields = {"author": " and ".join(paper.authors.split(", ")), "title": paper.title}
    where = "note" if paper.venue.startswith(("arXiv", "SciTePress", "Submitted")) else "booktitle"
    kind = "misc" if where == "note" else "inproceedings"
    return _written(kind, key, {**fields, where: paper.venue, "year": str(paper.year)})


def _written(kind: str, key: str, fields: dict[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])
