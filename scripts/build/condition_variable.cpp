// GCC 12 gave std::condition_variable::wait a new symbol version (GLIBCXX_3.4.30), and nothing else in llama.cpp needs more than GCC 11's
// libstdc++. It still has the old version, with the same code. Linked into every library and tool of portable.py, with
// -Wl,--wrap=_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, so that they run with GCC 11's library too.

extern "C" {
__asm__(".symver sherry_wait, _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
void sherry_wait(void * condition, void * lock);

__attribute__((visibility("hidden"))) void __wrap__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(void * condition, void * lock) {
    sherry_wait(condition, lock);
}
}
