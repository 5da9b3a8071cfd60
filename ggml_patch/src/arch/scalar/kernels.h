#pragma once

#include "../../isas.h"

tq1_25_vec_dot_t tq1_25_vec_dot_scalar;
stq1_0_vec_dot_t stq1_0_vec_dot_scalar;
