"""The RULER task families, made from any text: retrieval, variable tracking, and counting words.

Paper: RULER (arXiv:2404.06654) §3 and appendix B, whose wording the prompts have. Differs: haystack and words are those
of the text that is given, where the paper has essays and a dictionary; a prompt is filled up to its length to the
token; no chat template is put around it. So scores compare methods on one model, not with published ones. Question
answering is left out: it needs sets of questions that this package does not ship.
"""

from .run import TASKS, check, run

__all__ = ["TASKS", "check", "run"]
