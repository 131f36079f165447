"""Modules with torch.nn's signatures and state_dict."""

from interfuse.nn.conv_pool import ConvPool1d, ConvPool2d, ConvPool3d

__all__ = ["ConvPool1d", "ConvPool2d", "ConvPool3d"]
