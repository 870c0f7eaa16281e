from mutatis.variables import Variable as Variable, Param as Param
from mutatis.modules import Module as Module
from mutatis.statics import static as static
from mutatis.graph import variables as variables
