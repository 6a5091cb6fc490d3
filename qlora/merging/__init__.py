"""The exact merge of a trained adapter into the base it was trained on."""

from qlora.merging.merge import MergeReport, merge_adapter

__all__ = ["MergeReport", "merge_adapter"]
