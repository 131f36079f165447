"""Modules with torch.nn's signatures and state_dict."""
