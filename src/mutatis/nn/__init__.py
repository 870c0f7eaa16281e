"""Layers: modules with the names and defaults of the field; activations and initializers are those of `jax.nn`."""

from typing import Any

from jax.nn import celu as celu
from jax.nn import elu as elu
from jax.nn import gelu as gelu
from jax.nn import glu as glu
from jax.nn import hard_sigmoid as hard_sigmoid
from jax.nn import hard_silu as hard_silu
from jax.nn import hard_swish as hard_swish
from jax.nn import hard_tanh as hard_tanh
from jax.nn import identity as identity
from jax.nn import leaky_relu as leaky_relu
from jax.nn import log_sigmoid as log_sigmoid
from jax.nn import log_softmax as log_softmax
from jax.nn import logsumexp as logsumexp
from jax.nn import mish as mish
from jax.nn import one_hot as one_hot
from jax.nn import relu as relu
from jax.nn import relu6 as relu6
from jax.nn import selu as selu
from jax.nn import sigmoid as sigmoid
from jax.nn import silu as silu
from jax.nn import soft_sign as soft_sign
from jax.nn import softmax as softmax
from jax.nn import softplus as softplus
from jax.nn import sparse_plus as sparse_plus
from jax.nn import sparse_sigmoid as sparse_sigmoid
from jax.nn import squareplus as squareplus
from jax.nn import standardize as standardize
from jax.nn import swish as swish
from jax.nn import tanh as tanh

from mutatis import _equivalents, _homes
from mutatis.core.calls import constructs
from mutatis.nn import initializers as initializers
from mutatis.nn.activations import PReLU as PReLU
from mutatis.nn.attention import MultiHeadAttention as MultiHeadAttention
from mutatis.nn.caches import KVCache as KVCache
from mutatis.nn.caches import kv_caches as kv_caches
from mutatis.nn.carries import RNNCellBase as RNNCellBase
from mutatis.nn.containers import Sequential as Sequential
from mutatis.nn.convolution import Conv as Conv
from mutatis.nn.convolution import ConvTranspose as ConvTranspose
from mutatis.nn.dot_product import dot_product_attention as dot_product_attention
from mutatis.nn.dot_product import dot_product_attention_weights as dot_product_attention_weights
from mutatis.nn.dot_product import dot_product_attention_with_rope as dot_product_attention_with_rope
from mutatis.nn.embedding import Embed as Embed
from mutatis.nn.layer_norms import GroupNorm as GroupNorm
from mutatis.nn.layer_norms import InstanceNorm as InstanceNorm
from mutatis.nn.layer_norms import LayerNorm as LayerNorm
from mutatis.nn.layer_norms import RMSNorm as RMSNorm
from mutatis.nn.linear import Einsum as Einsum
from mutatis.nn.linear import Linear as Linear
from mutatis.nn.linear import LinearGeneral as LinearGeneral
from mutatis.nn.lora import LoRA as LoRA
from mutatis.nn.lora import LoRALinear as LoRALinear
from mutatis.nn.lora import LoRALinearGeneral as LoRALinearGeneral
from mutatis.nn.lora import LoRAParam as LoRAParam
from mutatis.nn.lora import adapters_off as adapters_off
from mutatis.nn.masks import combine_masks as combine_masks
from mutatis.nn.masks import make_attention_mask as make_attention_mask
from mutatis.nn.masks import make_causal_mask as make_causal_mask
from mutatis.nn.normalization import BatchNorm as BatchNorm
from mutatis.nn.pooling import AdaptiveAvgPool as AdaptiveAvgPool
from mutatis.nn.pooling import AdaptiveMaxPool as AdaptiveMaxPool
from mutatis.nn.pooling import adaptive_avg_pool as adaptive_avg_pool
from mutatis.nn.pooling import adaptive_max_pool as adaptive_max_pool
from mutatis.nn.pooling import avg_pool as avg_pool
from mutatis.nn.pooling import max_pool as max_pool
from mutatis.nn.pooling import min_pool as min_pool
from mutatis.nn.pooling import pool as pool
from mutatis.nn.positions import LearnedPositions as LearnedPositions
from mutatis.nn.positions import RoPE as RoPE
from mutatis.nn.positions import SinusoidalPositions as SinusoidalPositions
from mutatis.nn.recurrent import GRUCell as GRUCell
from mutatis.nn.recurrent import LSTMCell as LSTMCell
from mutatis.nn.recurrent import OptimizedLSTMCell as OptimizedLSTMCell
from mutatis.nn.recurrent import SimpleCell as SimpleCell
from mutatis.nn.sequences import RNN as RNN
from mutatis.nn.sequences import Bidirectional as Bidirectional
from mutatis.nn.sequences import flip_sequences as flip_sequences
from mutatis.nn.slots import SlotCache as SlotCache
from mutatis.nn.spiking.connections import Connection as Connection
from mutatis.nn.spiking.connections import FixedNum as FixedNum
from mutatis.nn.spiking.connections import FixedProb as FixedProb
from mutatis.nn.spiking.connections import OneToOne as OneToOne
from mutatis.nn.spiking.connections import Sparse as Sparse
from mutatis.nn.spiking.delays import Delay as Delay
from mutatis.nn.spiking.encoders import Poisson as Poisson
from mutatis.nn.spiking.encoders import latency as latency
from mutatis.nn.spiking.integrators import exp_euler as exp_euler
from mutatis.nn.spiking.integrators import rk4 as rk4
from mutatis.nn.spiking.neurons import ALIF as ALIF
from mutatis.nn.spiking.neurons import LI as LI
from mutatis.nn.spiking.neurons import LIF as LIF
from mutatis.nn.spiking.neurons import HodgkinHuxley as HodgkinHuxley
from mutatis.nn.spiking.neurons import Izhikevich as Izhikevich
from mutatis.nn.spiking.neurons import Neuron as Neuron
from mutatis.nn.spiking.synapses import STP as STP
from mutatis.nn.spiking.synapses import Alpha as Alpha
from mutatis.nn.spiking.synapses import DualExpon as DualExpon
from mutatis.nn.spiking.synapses import Expon as Expon
from mutatis.nn.spiking.units import dt as dt
from mutatis.nn.stack import Stack as Stack
from mutatis.nn.stochastic import Dropout as Dropout
from mutatis.nn.weight_norms import SpectralNorm as SpectralNorm
from mutatis.nn.weight_norms import WeightNorm as WeightNorm

__all__ = [
    "Connection",
    "FixedNum",
    "FixedProb",
    "OneToOne",
    "Sparse",
    "Delay",
    "Poisson",
    "latency",
    "dt",
    "exp_euler",
    "rk4",
    "ALIF",
    "HodgkinHuxley",
    "Izhikevich",
    "LI",
    "LIF",
    "Neuron",
    "STP",
    "Alpha",
    "DualExpon",
    "Expon",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "BatchNorm",
    "Bidirectional",
    "Conv",
    "ConvTranspose",
    "Dropout",
    "Einsum",
    "Embed",
    "GRUCell",
    "GroupNorm",
    "InstanceNorm",
    "KVCache",
    "LSTMCell",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "LinearGeneral",
    "MultiHeadAttention",
    "PReLU",
    "RMSNorm",
    "RoPE",
    "Sequential",
    "SinusoidalPositions",
    "SlotCache",
    "LoRA",
    "LoRALinear",
    "LoRALinearGeneral",
    "LoRAParam",
    "OptimizedLSTMCell",
    "RNN",
    "RNNCellBase",
    "SimpleCell",
    "SpectralNorm",
    "Stack",
    "WeightNorm",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "adapters_off",
    "avg_pool",
    "combine_masks",
    "dot_product_attention",
    "dot_product_attention_weights",
    "dot_product_attention_with_rope",
    "kv_caches",
    "make_attention_mask",
    "make_causal_mask",
    "flip_sequences",
    "max_pool",
    "min_pool",
    "pool",
]


_RENAMED = {  # parameters of layers of PyTorch and Keras
    "bias": "use_bias",
    "stride": "strides",
    "dilation": "kernel_dilation",
    "groups": "feature_group_count",
    "in_channels": "in_features",
    "out_channels": "out_features",
    "embedding_dim": "features",
    "embed_dim": "in_features",
    "normalized_shape": "num_features",
    "eps": "epsilon",
    "p": "rate",
    "units": "out_features",
    "filters": "out_features",
    "input_size": "in_features",
    "hidden_size": "hidden_features",
}
for _name in __all__:
    if isinstance(_class := globals()[_name], type) and _class.__module__.startswith("mutatis."):
        constructs(_class, "nn", _RENAMED)


def __getattr__(name: str) -> Any:
    raise _equivalents.missing(__name__, name)


_homes.publish(__name__, {name: globals()[name] for name in __all__})
