"""The exact merge of a trained adapter into the base it was trained on."""

from qlora.merging.merge import MergeReport, merge_adapter
from qlora.merging.source import MergedSource

__all__ = ["MergeReport", "MergedSource", "merge_adapter"]
