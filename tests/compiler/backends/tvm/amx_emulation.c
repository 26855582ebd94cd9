/* The AMX tile instructions in C, so that the AMX kernels run in tests on hosts without AMX.
 *
 * Semantics follow Intel's manual for the subset the kernels use: palette 1, eight tiles of up to 16 rows x 64 bytes.
 * What the hardware rejects (no configuration, tile number or configuration out of range) ends the process. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint8_t palette, start_row, reserved[14]; uint16_t colsb[16]; uint8_t rows[16]; } config_t;

static __thread config_t config;
static __thread uint8_t tiles[8][16][64];

static void require(int condition, const char *what) {
    if (!condition) {
        fprintf(stderr, "amx emulation: %s\n", what);
        abort();
    }
}

static void check(int tile) {
    require(config.palette == 1, "tile instruction without ldtilecfg");
    require(tile >= 0 && tile < 8, "tile number out of range");
    require(config.rows[tile] >= 1 && config.rows[tile] <= 16 && config.colsb[tile] <= 64, "bad tile configuration");
}

int belle_emulated_ldtilecfg(const void *from) {
    memcpy(&config, from, sizeof config);
    require(config.palette == 1 && config.start_row == 0, "palette 1 and start row 0 expected");
    memset(tiles, 0, sizeof tiles);
    return 0;
}

int belle_emulated_tilerelease(void) {
    memset(&config, 0, sizeof config);
    return 0;
}

int belle_emulated_tilezero(int8_t tile) {
    check(tile);
    memset(tiles[tile], 0, sizeof tiles[tile]);
    return 0;
}

int belle_emulated_tileloadd64(int8_t tile, const void *from, int64_t stride) {
    check(tile);
    memset(tiles[tile], 0, sizeof tiles[tile]);
    for (int row = 0; row < config.rows[tile]; row++)
        memcpy(tiles[tile][row], (const char *)from + row * stride, config.colsb[tile]);
    return 0;
}

int belle_emulated_tilestored64(int8_t tile, void *to, int64_t stride) {
    check(tile);
    for (int row = 0; row < config.rows[tile]; row++)
        memcpy((char *)to + row * stride, tiles[tile][row], config.colsb[tile]);
    return 0;
}

static float bfloat16(const void *from) {
    uint32_t bits = 0;
    float value;
    memcpy((char *)&bits + 2, from, 2);
    memcpy(&value, &bits, 4);
    return value;
}

/* tiles[c] += unsigned bytes of tiles[a] x signed bytes of tiles[b], four at a time, in int32 */
int belle_emulated_tdpbusd(int8_t c, int8_t a, int8_t b) {
    check(c), check(a), check(b);
    require(config.colsb[a] / 4 == config.rows[b] && config.rows[c] == config.rows[a] && config.colsb[c] == config.colsb[b],
            "tile shapes do not match");
    for (int row = 0; row < config.rows[c]; row++)
        for (int k = 0; k < config.colsb[a] / 4; k++)
            for (int column = 0; column < config.colsb[c] / 4; column++) {
                int32_t sum;
                memcpy(&sum, &tiles[c][row][4 * column], 4);
                for (int byte = 0; byte < 4; byte++)
                    sum += (int32_t)tiles[a][row][4 * k + byte] * (int32_t)(int8_t)tiles[b][k][4 * column + byte];
                memcpy(&tiles[c][row][4 * column], &sum, 4);
            }
    return 0;
}

/* tiles[c] += pairs of bfloat16 of tiles[a] x pairs of tiles[b], in float32: all first ones, all second ones, then both */
int belle_emulated_tdpbf16ps(int8_t c, int8_t a, int8_t b) {
    check(c), check(a), check(b);
    require(config.colsb[a] / 4 == config.rows[b] && config.rows[c] == config.rows[a] && config.colsb[c] == config.colsb[b],
            "tile shapes do not match");
    for (int row = 0; row < config.rows[c]; row++)
        for (int column = 0; column < config.colsb[c] / 4; column++) {
            float sums[2] = {0, 0}, old;
            for (int k = 0; k < config.colsb[a] / 4; k++)
                for (int half = 0; half < 2; half++)
                    sums[half] = fmaf(bfloat16(&tiles[a][row][4 * k + 2 * half]),
                                      bfloat16(&tiles[b][k][4 * column + 2 * half]), sums[half]);
            memcpy(&old, &tiles[c][row][4 * column], 4);
            old += sums[0] + sums[1];
            memcpy(&tiles[c][row][4 * column], &old, 4);
        }
    return 0;
}
