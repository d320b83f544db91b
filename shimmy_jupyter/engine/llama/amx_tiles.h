/* For compiling llama.cpp with a GCC whose <amxtileintrin.h> does not say that these instructions read
 * memory (GCC 12 has no operand for it but the first 8 bytes of a configuration, and none at all for
 * a tile). The optimiser then takes what was written there for dead, and llama.cpp ends with a general
 * protection fault at its first matrix multiplication on a processor with AMX. Force-included:
 * CXXFLAGS="-include .../amx_tiles.h". It does nothing for other compilers and processors.
 *
 * The instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG,
 * STTILECFG, TILELOADD.
 */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__AMX_TILE__)

#include <immintrin.h>

#undef _tile_loadd
#undef _tile_stream_loadd

#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg\t%0" ::"m"(*(const char(*)[64])(config)) : "memory")
#define _tile_storeconfig(config) \
    __asm__ volatile("sttilecfg\t%0" : "=m"(*(char(*)[64])(config))::"memory")
#define _tile_loadd(tile, base, stride)                                                    \
    __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" SHIMMY_TEXT(tile)::"r"(                 \
                         (const void *)(base)),                                            \
                     "r"((long)(stride))                                                   \
                     : "memory")
#define _tile_stream_loadd(tile, base, stride)                                             \
    __asm__ volatile("tileloaddt1\t(%0,%1,1), %%tmm" SHIMMY_TEXT(tile)::"r"(               \
                         (const void *)(base)),                                            \
                     "r"((long)(stride))                                                   \
                     : "memory")
/* Twice, so that a tile that is named by a macro is its number. */
#define SHIMMY_TEXT(tile) SHIMMY_TEXT_(tile)
#define SHIMMY_TEXT_(tile) #tile

#endif
