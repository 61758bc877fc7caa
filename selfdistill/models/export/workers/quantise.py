"""Writes a GGUF file anew in another type, through llama-cpp-python: quantise.py IN OUT FTYPE_NUMBER."""

import ctypes
import sys

import llama_cpp

settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = int(sys.argv[3])
if llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(settings)):
    sys.exit("llama_model_quantize failed")
