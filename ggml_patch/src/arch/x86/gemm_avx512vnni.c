// Panels for AVX-512 with VNNI.

#include "x86.h"

#ifdef TQ1_25_X86

#define BROADCAST(p) _mm512_set1_epi32(*(const int32_t *) (p))

// 32 rows by nc columns, whose sums over a Q8_0 block and over a block of weights stay in registers: two loads of weights and six of
// activations feed twelve products. 16 by 12 in as many registers loads more than it multiplies (0.9 of this rate); 32 by 12 with the
// block sums in the L1 cache gave 0.8.
TARGET(AVX512VNNI) INLINE void half_tile(int parts, int64_t units, int nc, float * s, const uint8_t * w, int half, const int8_t * panel) {
    for (int64_t i = 0; i < units; ++i, w += TQ1_25_DECODED(parts)) {
        __m512 block[TQ1_25_COLUMNS][2];
        UNROLL for (int c = 0; c < nc; ++c) { block[c][0] = block[c][1] = _mm512_setzero_ps(); }
        const uint8_t *rows0 = w + 2 * half * TQ1_25_DECODED_SIXTEEN(parts), *rows1 = rows0 + TQ1_25_DECODED_SIXTEEN(parts);
        const float * scales = (const float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)) + 32 * half;
        for (int j = 0; j < parts; ++j) {
            __m512i sum[TQ1_25_COLUMNS][2];
            UNROLL for (int c = 0; c < nc; ++c) { sum[c][0] = sum[c][1] = BROADCAST(panel + 4 * (GROUPS * nc + c)); }
            UNROLL for (int g = 0; g < GROUPS; ++g, rows0 += 64, rows1 += 64) {
                const __m512i w0 = _mm512_loadu_si512(rows0), w1 = _mm512_loadu_si512(rows1);
                UNROLL for (int c = 0; c < nc; ++c) {
                    const __m512i y = BROADCAST(panel + 4 * (g * nc + c));
                    sum[c][0] = _mm512_dpbusd_epi32(sum[c][0], w0, y);
                    sum[c][1] = _mm512_dpbusd_epi32(sum[c][1], w1, y);
                }
            }
            UNROLL for (int c = 0; c < nc; ++c) {
                const __m512 d = _mm512_set1_ps(*(const float *) (panel + 4 * ((GROUPS + 1) * nc + c)));
                const __m512 f0 = _mm512_cvtepi32_ps(sum[c][0]), f1 = _mm512_cvtepi32_ps(sum[c][1]);
                block[c][0] = _mm512_fmadd_ps(f0, d, block[c][0]);
                block[c][1] = _mm512_fmadd_ps(f1, d, block[c][1]);
            }
            panel += 4 * (GROUPS + 2) * nc;
        }
        const __m512 d0 = _mm512_loadu_ps(scales), d1 = _mm512_loadu_ps(scales + 16);
        UNROLL for (int c = 0; c < nc; ++c) {
            float * to = s + TQ1_25_TILE * c + 32 * half;
            const __m512 t0 = i == 0 ? _mm512_setzero_ps() : _mm512_load_ps(to);
            const __m512 t1 = i == 0 ? _mm512_setzero_ps() : _mm512_load_ps(to + 16);
            _mm512_store_ps(to, _mm512_fmadd_ps(block[c][0], d0, t0));
            _mm512_store_ps(to + 16, _mm512_fmadd_ps(block[c][1], d1, t1));
        }
    }
}

TARGET(AVX512VNNI) INLINE void gemm(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    for (int half = 0; half < 2; ++half) {
#define PRODUCT(parts, nc) half_tile(parts, units, nc, s, w, half, panel)
        BY_COLUMNS(parts, nc, PRODUCT)
    }
}

TARGET(AVX512VNNI) APART void gemm_64(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    gemm(PARTS_64, units, nc, s, w, panel);
}
TARGET(AVX512VNNI) APART void gemm_128(int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    gemm(PARTS, units, nc, s, w, panel);
}

TARGET(AVX512VNNI) void tq1_25_gemm_avx512vnni(int parts, int64_t units, int nc, float * s, const uint8_t * w, const int8_t * panel) {
    (parts == PARTS_64 ? gemm_64 : gemm_128)(units, nc, s, w, panel);
}

// ---- decoding ----

TARGET(AVX512) void tq1_25_decode_avx512vnni(int parts, tq1_25_unit x, uint8_t * w) {
    // The four weights of each code plus one, as dwords: one register for positive signs, one for negative signs.
    const __m512i one = _mm512_set1_epi8(1), slot = _mm512_set1_epi32(15);
    __m512i positive = _mm512_setzero_si512();
    for (int lane = 0; lane < TQ1_25_GROUP; ++lane) {
        const __m512i of_lane = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) tq1_25_lanes[lane]));
        positive = _mm512_or_si512(positive, _mm512_sllv_epi32(of_lane, _mm512_set1_epi32(8 * lane)));
    }
    const __m512i codes0 = _mm512_add_epi8(one, positive), codes1 = _mm512_sub_epi8(one, positive);
#define SIXTEEN(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) ((p) + 16 * at)))
    for (int at = 0; at < TQ1_25_TILE / 16; ++at) {
        uint8_t * out = w + at * TQ1_25_DECODED_SIXTEEN(parts);
        for (int j = 0; j < parts; ++j, out += 64 * GROUPS) {
            const __m512i sign = _mm512_slli_epi32(SIXTEEN(x.part[j].sign), 4); // bit 4 + g
#define WEIGHTS(g, bits)                                           \
    _mm512_storeu_si512(out + 64 * (g), _mm512_permutex2var_epi32( \
                                            codes0, _mm512_ternarylogic_epi32(slot, bits, _mm512_srli_epi32(sign, g), 0xca), codes1));
            for (int g = 0; g < GROUPS / 2; ++g) {
                const __m512i bits = SIXTEEN(x.part[j].qs[g]);
                WEIGHTS(g, bits)
                WEIGHTS(g + 4, _mm512_srli_epi32(bits, 4))
            }
        }
    }
    tq1_25_decode_scales(x.d, (float *) (w + 4 * TQ1_25_DECODED_SIXTEEN(parts)));
}

#endif
