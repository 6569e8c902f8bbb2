"""streamlstm: forecasts time series while it learns them."""

__version__ = "0.1.0"
