"""Codec, packed state and operators: decompose, quantise, store; fused dequantise-attention."""
