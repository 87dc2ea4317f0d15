"""The methods: one file for each, with its options and what it does to the encoder or beside it."""

from .adalora import AdaLoRAConfig
from .adapters import AdapterConfig
from .base import MeftConfig
from .full import BitFitConfig, FullConfig
from .head import HeadConfig, WeightedSumConfig
from .lora import LoRAConfig, LoRAPlusConfig
from .mezo import MeZOConfig
from .s2_lora import S2LoRAConfig
from .side_networks import LSTConfig, SHERLConfig, SideNetworkConfig, UniPTConfig

__all__ = [
    "AdaLoRAConfig",
    "AdapterConfig",
    "BitFitConfig",
    "FullConfig",
    "HeadConfig",
    "LSTConfig",
    "LoRAConfig",
    "LoRAPlusConfig",
    "MeZOConfig",
    "MeftConfig",
    "S2LoRAConfig",
    "SHERLConfig",
    "SideNetworkConfig",
    "UniPTConfig",
    "WeightedSumConfig",
]
