"""Simulated clusters from YAML files, and profiles of devices made from live engines."""

from ._calibrate import Calibration, calibrate
from ._catalogue import find_geometry, load_geometry, load_profile
from ._engine_client import EngineClient
from ._load import CLUSTERS, load_cluster
from ._profile_file import profile_yaml
from ._room import KV_SHARE, USABLE_SHARE, fitting_bytes, weights_ratio
from ._scaled import scaled
from ._step_fit import DecodePoint, PrefillPoint, StepFit, fit_steps

__all__ = [
    "CLUSTERS",
    "KV_SHARE",
    "USABLE_SHARE",
    "Calibration",
    "DecodePoint",
    "EngineClient",
    "PrefillPoint",
    "StepFit",
    "calibrate",
    "find_geometry",
    "fit_steps",
    "fitting_bytes",
    "load_cluster",
    "load_geometry",
    "load_profile",
    "profile_yaml",
    "scaled",
    "weights_ratio",
]
