from mutatis.variables import *
from mutatis.modules import Module as Module
from mutatis.statics import static as static
from mutatis.graph import variables as variables
from mutatis.state import *
from mutatis.transforms.jit import jit as jit
