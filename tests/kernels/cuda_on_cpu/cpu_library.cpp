// csrc/library.cpp with its operators registered for CPU tensors.

#include "operators.h"

#include <torch/csrc/stable/library.h>

#define CUDA CPU
#include "library.cpp"
