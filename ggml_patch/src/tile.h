// The repacked layout, which every product of repacked rows reads, and what the products make of it.
//
// At load, 64 rows are interleaved so that one instruction reads the same place in each. A matrix keeps its size: first rows / 64 rows
// of tiles, one tile per block, then up to 63 leftover rows as the plain blocks they were.
//
// STQ1_0's weights are stored in the order of their groups, so that the same kernels multiply all types. Its activations are put into
// that order before they are quantized to Q8_0 (stq1_0_order).

#pragma once

#include "tq1_25.h"

#define TQ1_25_TILE 64 // rows

// 64 rows by the 32 weights, eight groups, that meet one Q8_0 block.
typedef struct {
    uint8_t qs[TQ1_25_QK8_0 / TQ1_25_GROUP / 2][TQ1_25_TILE]; // byte i: the slots of groups i and 4+i
    uint8_t sign[TQ1_25_TILE];                                // one bit per group
} tq1_25_part;

// One block of each of 64 rows: 22 cache lines.
typedef struct {
    tq1_25_part part[QK_TQ1_25 / TQ1_25_QK8_0];
    uint16_t d[TQ1_25_TILE]; // d[place] is the scale of row TQ1_25_ROW(place)
} tq1_25_tile;
TQ1_25_ASSERT(sizeof(tq1_25_tile) == TQ1_25_TILE * sizeof(block_tq1_25), "tq1_25_tile has padding");

// 42 cache lines.
typedef struct {
    tq1_25_part part[QK_STQ1_0 / TQ1_25_QK8_0];
    uint16_t d[TQ1_25_TILE];
} stq1_0_tile;
TQ1_25_ASSERT(sizeof(stq1_0_tile) == TQ1_25_TILE * sizeof(block_stq1_0), "stq1_0_tile has padding");

// 12 cache lines.
typedef struct {
    tq1_25_part part[QK_TQ1_25_64 / TQ1_25_QK8_0];
    uint16_t d[TQ1_25_TILE];
} tq1_25_64_tile;
TQ1_25_ASSERT(sizeof(tq1_25_64_tile) == TQ1_25_TILE * sizeof(block_tq1_25_64), "tq1_25_64_tile has padding");

// The order of the scales is the order in which lookups produce sums. With a row's bits written kk h mm o, its place is h o kk mm.
#define TQ1_25_ROW(place) (((place) >> 2 & 3) << 4 | ((place) >> 5) << 3 | ((place) & 3) << 1 | ((place) >> 4 & 1))
#define TQ1_25_PLACE(row) (((row) >> 3 & 1) << 5 | ((row) & 1) << 4 | (row) >> 4 << 2 | ((row) >> 1 & 3)) // its inverse

enum tq1_25_kind { KIND_TQ1_25 = 0, KIND_STQ1_0 = 1, KIND_TQ1_25_64 = 2, TQ1_25_KINDS = 3 };

// A unit is what the kernels for several vectors work on at a time: weights of each of 64 rows, in the order of the groups, that share a
// scale. It is a tile of TQ1_25 (four parts), half a tile of STQ1_0 (four) or a tile of TQ1_25_64 (two).
typedef struct {
    const tq1_25_part * part;
    const uint16_t * d;
} tq1_25_unit;

// Tables, for one vector. With four given activations, a group has one of 32 sums, one per code. They are tabulated once per vector, and
// each row looks up its share. AVX-512 and NEON index by code, sign << 4 | slot; AVX-512 has 32 int16 per group. NEON and AVX2 split a
// sum t into bytes, t = TQ1_25_SPLIT * high + low. With |t| <= 3 * 128 both parts are at most 14, so that a byte holds the sum of the
// eight groups that share a scale. AVX2 has 16 high parts per group by slot, then 16 low ones.
#define TQ1_25_SPLIT 28
#define TQ1_25_TABLE_AVX2 (TQ1_25_QK8_0 / TQ1_25_GROUP * 32) // bytes per Q8_0 block
#define TQ1_25_TABLE (TQ1_25_QK8_0 / TQ1_25_GROUP * 64)      // the same for AVX-512 and NEON; the largest of all

// Codes, for several vectors: the codes of one or two units, spread to bytes once for all vectors, which then look up the same tables.
typedef union {
    struct { // AVX-512
        uint8_t code[TQ1_25_GROUPS][2][TQ1_25_TILE]; // [group][tile][row]: sign << 4 | slot; the upper three bits are arbitrary
        uint8_t after[TQ1_25_TILE];                  // read past the end, without effect
        float d[2][TQ1_25_TILE];                     // in the order of the sums
    } two;
    struct { // AVX2
        uint8_t slot[TQ1_25_GROUPS][TQ1_25_TILE];
        uint8_t mask[TQ1_25_GROUPS][TQ1_25_TILE];                // 255 if the sign is negative
        uint8_t negative[QK_TQ1_25 / TQ1_25_QK8_0][TQ1_25_TILE]; // number of negative groups in a part
        float d[TQ1_25_TILE];                                    // in the order of the sums
    } one;
    struct { // NEON
        uint8_t code[TQ1_25_GROUPS][TQ1_25_TILE]; // sign << 4 | slot
        float d[TQ1_25_TILE];
    } neon;
} tq1_25_codes;

// Wide tables, for many vectors: the sums of up to 32 of them side by side, int16 [group][code][vector], for one Q8_0 block.
#define TQ1_25_WIDE_COLUMNS 32
#define TQ1_25_WIDE_TABLE (TQ1_25_QK8_0 / TQ1_25_GROUP * 32 * TQ1_25_WIDE_COLUMNS) // int16

// Panels, for many vectors: a unit as weights plus one, since the multiplications want them unsigned, uint8 [sixteen rows][group][row][lane],
// then its 64 scales, float. These are the sizes in bytes, by the number of parts.
#define TQ1_25_DECODED_SIXTEEN(parts) (16 * TQ1_25_QK8_0 * (parts))
#define TQ1_25_DECODED(parts) (TQ1_25_TILE / 16 * TQ1_25_DECODED_SIXTEEN(parts) + TQ1_25_TILE * (int) sizeof(float))

// Columns in a panel, the activations of up to six vectors. Each 32 of them are eight groups by nc columns by four int8; then nc int32,
// minus the sum of the column's 32, which takes the one off each weight again; then nc float, the scales.
#define TQ1_25_COLUMNS 6
