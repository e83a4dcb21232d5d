"""Adapter folders of PEFT."""

from .adapter_config import AdapterConfig as AdapterConfig
from .adapter_config import plain_number as plain_number
from .adapter_config import read_adapter_config as read_adapter_config
from .read import Adapter as Adapter
from .read import grown_config as grown_config
from .read import read_adapter as read_adapter
from .read import read_lora as read_lora
from .stretch import Stretch as Stretch
from .stretch import stretch_of as stretch_of
from .write import write_adapter as write_adapter
