/* gf256.c as it is compiled for aarch64, with a C model of the NEON instructions (arm_neon.h beside this file). */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#undef __x86_64__
#undef __aarch64__
#define __aarch64__ 1
#define GHOSTSERVE_EMULATED
#include "gf256.c"
#include "read.c"
