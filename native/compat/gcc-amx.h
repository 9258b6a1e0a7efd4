// gcc-amx.h - included before every C++ file of ggml's CPU backend.
//
// GCC before 11.5, 12.4 and 13.3 takes _tile_loadconfig() for reading 8 bytes of the 64 (its PR 114098) and drops the stores
// of the others: the first product with quantised weights crashes on processors with AMX. Debian 12 has GCC 12.2.

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 14
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" : : "m"(*(const char (*)[64])(config)))
#endif
