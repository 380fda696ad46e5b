"""The selectors by kind. A new one is a file beside these and a line here."""

from curation.selection.block_list import BlockList
from curation.selection.caption_rules import CaptionRules
from curation.selection.cluster_balance import ClusterBalance
from curation.selection.concept_balance import ConceptBalance
from curation.selection.decontamination import Decontamination
from curation.selection.exact_duplicates import ExactDuplicates
from curation.selection.fraction import Fraction
from curation.selection.fusion import ScoreFusion
from curation.selection.image_based import ImageBased
from curation.selection.joined import AllOf, AnyOf
from curation.selection.language import LanguageIs
from curation.selection.near_duplicates import NearDuplicates
from curation.selection.reference_quantile import ReferenceQuantile
from curation.selection.semantic_duplicates import SemanticDuplicates
from curation.selection.threshold import Threshold
from curation.selection.uids import Uids
from curation.selection.values import Values

SELECTORS: dict[str, type] = {
    "threshold": Threshold,
    "fraction": Fraction,
    "score_fusion": ScoreFusion,
    "reference_quantile": ReferenceQuantile,
    "language": LanguageIs,
    "caption_rules": CaptionRules,
    "exact_duplicates": ExactDuplicates,
    "near_duplicates": NearDuplicates,
    "semantic_duplicates": SemanticDuplicates,
    "cluster_balance": ClusterBalance,
    "concept_balance": ConceptBalance,
    "image_based": ImageBased,
    "uids": Uids,
    "block_list": BlockList,
    "values": Values,
    "decontamination": Decontamination,
    "any_of": AnyOf,
    "all_of": AllOf,
}
