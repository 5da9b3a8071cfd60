// Panels for AVX-VNNI.

#include "x86.h"

#ifdef TQ1_25_AVXVNNI

#define LOAD(p) _mm256_loadu_si256((const __m256i *) (p))
#ifndef DPBUSD // a test on a CPU without AVX-VNNI uses the instruction of AVX-512
#    define DPBUSD _mm256_dpbusd_avx_epi32
#endif
#define BROADCAST(p) _mm256_set1_epi32(*(const int32_t *) (p))

enum { WIDTH = 3 }; // columns at a time: sums over a Q8_0 block and over a block of weights fill twelve of sixteen registers

// 16 rows, a quarter of a tile, by columns first .. first + width - 1 of a panel's nc.
TARGET(AVXVNNI) INLINE void quarter_tile(int parts, int64_t units, int nc, int first, int width, float * s, const uint8_t * w, int quarter,
                                         const int8_t * panel) {
    for (int64_t i = 0; i < units; ++i, w += TQ1_25_DECODED(parts)) {
        __m256 block[WIDTH][2];
        UNROLL for (int c = 0; c < width; ++c) { block[c][0] = block[c][1] = _mm256_setzero_ps(); }
        const uint8_t * rows = w + quarter * TQ1_25_DECODED_SIXTEEN(parts);
        const float * scales = (const float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)) + 16 * quarter;
        for (int j = 0; j < parts; ++j) {
            __m256i sum[WIDTH][2];
            UNROLL for (int c = 0; c < width; ++c) { sum[c][0] = sum[c][1] = BROADCAST(panel + 4 * (GROUPS * nc + first + c)); }
            UNROLL for (int g = 0; g < GROUPS; ++g, rows += 64) {
                const __m256i w0 = LOAD(rows), w1 = LOAD(rows + 32);
                UNROLL for (int c = 0; c < width; ++c) {
                    const __m256i y = BROADCAST(panel + 4 * (g * nc + first + c));
                    sum[c][0] = DPBUSD(sum[c][0], w0, y);
                    sum[c][1] = DPBUSD(sum[c][1], w1, y);
                }
            }
            UNROLL for (int c = 0; c < width; ++c) {
                const __m256 d = _mm256_set1_ps(*(const float *) (panel + 4 * ((GROUPS + 1) * nc + first + c)));
                const __m256 f0 = _mm256_cvtepi32_ps(sum[c][0]), f1 = _mm256_cvtepi32_ps(sum[c][1]);
                block[c][0] = _mm256_fmadd_ps(f0, d, block[c][0]);
                block[c][1] = _mm256_fmadd_ps(f1, d, block[c][1]);
            }
            panel += 4 * (GROUPS + 2) * nc;
        }
        const __m256 d0 = _mm256_loadu_ps(scales), d1 = _mm256_loadu_ps(scales + 8);
        UNROLL for (int c = 0; c < width; ++c) {
            float * to = s + TQ1_25_TILE * (first + c) + 16 * quarter;
            const __m256 t0 = i == 0 ? _mm256_setzero_ps() : _mm256_load_ps(to);
            const __m256 t1 = i == 0 ? _mm256_setzero_ps() : _mm256_load_ps(to + 8);
            _mm256_store_ps(to, _mm256_fmadd_ps(block[c][0], d0, t0));
            _mm256_store_ps(to + 8, _mm256_fmadd_ps(block[c][1], d1, t1));
        }
    }
}

TARGET(AVXVNNI) INLINE void gemm(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
// One pass over the rows, or two. With numbers of columns that are not constant, GCC runs out of registers for addresses.
#define FIRST(nc) ((nc) <= WIDTH ? (nc) : ((nc) + 1) / 2)
#define PRODUCT(parts, nc)                                                         \
    quarter_tile(parts, units, nc, 0, FIRST(nc), s, w, quarter, panel);            \
    if (FIRST(nc) < (nc)) {                                                        \
        quarter_tile(parts, units, nc, FIRST(nc), (nc) / 2, s, w, quarter, panel); \
    }
    for (int quarter = 0; quarter < TQ1_25_TILE / 16; ++quarter) {
        BY_COLUMNS(parts, nc, PRODUCT)
    }
}

TARGET(AVXVNNI) APART void gemm_64(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    gemm(PARTS_64, units, nc, s, w, panel);
}
TARGET(AVXVNNI) APART void gemm_128(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    gemm(PARTS, units, nc, s, w, panel);
}

TARGET(AVXVNNI) void tq1_25_gemm_avxvnni(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    (parts == PARTS_64 ? gemm_64 : gemm_128)(units, nc, s, w, panel);
}

// ---- decoding ----

TARGET(AVX2) void tq1_25_decode_avxvnni(int parts, tq1_25_unit x, uint8_t * w) {
    const __m256i one = _mm256_set1_epi8(1), nibble = _mm256_set1_epi8(15);
    __m256i table[TQ1_25_GROUP];
    for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
        table[lane] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) tq1_25_lanes[lane]));
    }
    for (int at = 0; at < TQ1_25_TILE; at += 32) {
        uint8_t * of_rows = w + at / 16 * TQ1_25_DECODED_SIXTEEN(parts);
        for (int j = 0; j < parts; ++j) {
            uint8_t *lower = of_rows + 64 * GROUPS * j, *upper = lower + TQ1_25_DECODED_SIXTEEN(parts);
            const __m256i signs = LOAD(x.part[j].sign + at);
#define OF_LANE(l) _mm256_add_epi8(one, _mm256_sign_epi8(_mm256_shuffle_epi8(table[l], slots), sign))
#define STORE(to, v) _mm256_storeu_si256((__m256i *) (to), v)
// From the bytes that hold a group's slots, and from signs with the group's bit on top.
#define WEIGHTS(g, bits, turned)                                                                       \
    {                                                                                                  \
        const __m256i slots = _mm256_and_si256(bits, nibble), sign = _mm256_or_si256(turned, one);     \
        const __m256i l0 = OF_LANE(0), l1 = OF_LANE(1), l2 = OF_LANE(2), l3 = OF_LANE(3);              \
        /* four bytes per row; 128-bit half k holds rows from 16k, 16k + 4, 16k + 8 and 16k + 12 on */ \
        const __m256i l01 = _mm256_unpacklo_epi8(l0, l1), h01 = _mm256_unpackhi_epi8(l0, l1);          \
        const __m256i l23 = _mm256_unpacklo_epi8(l2, l3), h23 = _mm256_unpackhi_epi8(l2, l3);          \
        const __m256i r0 = _mm256_unpacklo_epi16(l01, l23), r4 = _mm256_unpackhi_epi16(l01, l23);      \
        const __m256i r8 = _mm256_unpacklo_epi16(h01, h23), r12 = _mm256_unpackhi_epi16(h01, h23);     \
        STORE(lower + 64 * (g), _mm256_permute2x128_si256(r0, r4, 0x20));                              \
        STORE(lower + 64 * (g) + 32, _mm256_permute2x128_si256(r8, r12, 0x20));                        \
        STORE(upper + 64 * (g), _mm256_permute2x128_si256(r0, r4, 0x31));                              \
        STORE(upper + 64 * (g) + 32, _mm256_permute2x128_si256(r8, r12, 0x31));                        \
    }
            const __m256i b0 = LOAD(x.part[j].qs[0] + at), b1 = LOAD(x.part[j].qs[1] + at);
            const __m256i b2 = LOAD(x.part[j].qs[2] + at), b3 = LOAD(x.part[j].qs[3] + at);
            WEIGHTS(0, b0, _mm256_slli_epi16(signs, 7))
            WEIGHTS(1, b1, _mm256_slli_epi16(signs, 6))
            WEIGHTS(2, b2, _mm256_slli_epi16(signs, 5))
            WEIGHTS(3, b3, _mm256_slli_epi16(signs, 4))
            WEIGHTS(4, _mm256_srli_epi16(b0, 4), _mm256_slli_epi16(signs, 3))
            WEIGHTS(5, _mm256_srli_epi16(b1, 4), _mm256_slli_epi16(signs, 2))
            WEIGHTS(6, _mm256_srli_epi16(b2, 4), _mm256_slli_epi16(signs, 1))
            WEIGHTS(7, _mm256_srli_epi16(b3, 4), signs)
        }
    }
    tq1_25_decode_scales(x.d, (float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)));
}

#endif
