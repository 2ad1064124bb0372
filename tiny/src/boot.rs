//! From multiboot's 32-bit entry, or another processor's 16-bit one, to 64-bit Rust: page tables and interrupts.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .multiboot, "a"
    .code32
    .align 4
header:
    .long 0x1badb002
    .long 0x00010002            /* addresses given; memory information wanted */
    .long -(0x1badb002 + 0x00010002)
    .long header
    .long image_start
    .long image_end
    .long bss_end
    .long start

    .global start
start:
    cli
    lea esp, stack_end
    mov [boot_info], ebx

    /* Identity map of 64 GiB: one table of 64 directories of 512 pages of 2 MiB. */
    lea edi, directories
    mov eax, 0x83
    xor edx, edx
    mov ecx, 64 * 512
2:  mov [edi], eax
    mov [edi + 4], edx
    add edi, 8
    add eax, 0x200000
    adc edx, 0
    dec ecx
    jnz 2b
    lea edi, pointers
    lea eax, directories
    or eax, 3
    mov ecx, 64
3:  mov [edi], eax
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 3b
    lea eax, pointers
    or eax, 3
    mov [top], eax

    /* From here on every processor goes the same way. */
protected:
    mov eax, cr4
    or eax, 0x620               /* PAE; SSE and its exceptions, should a build use it */
    mov cr4, eax
    lea eax, top
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100               /* long mode */
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb         /* caches on, no emulation of the FPU */
    or eax, 0x80000002          /* paging */
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                  /* jmp 8:start64 */
    .long start64
    .word 8

    .code64
start64:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    lidt [rip + idt_pointer]
    /* The first processor is number 0; the others have a page of stack each, behind its stack. */
    mov edi, 1
    lock xadd dword ptr [rip + UP], edi
    mov eax, edi
    shl eax, 12
    lea rsp, [rip + stack_end]
    add rsp, rax
    test edi, edi
    jnz 5f
    mov edi, dword ptr [rip + boot_info]
    call main
5:  call processor

    /* Where the other processors start, copied below 1 MiB; there is no data in it, and no address within it. */
    .code16
    .global trampoline, trampoline_end
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x67, 0x0f, 0x01, 0x15      /* lgdt [TRAMPOLINE + gdt_copy - trampoline], with 32-bit operands */
    .long {trampoline} + gdt_copy - trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea            /* jmp 24:others */
    .long others
    .word 24
gdt_copy:
    .word 31
    .long gdt
trampoline_end:

    .code32
others:
    mov ax, 16
    mov ds, ax
    jmp protected

    .code64
    /* Interrupts only end a `hlt`. */
    .global tick
tick:
    push rax
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq

    /* So does another processor. */
    .global wake
wake:
    push rax
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

    .section .data
    .align 8
gdt:
    .quad 0
    .quad 0x00af9a000000ffff
    .quad 0x00cf92000000ffff
    .quad 0x00cf9a000000ffff
gdt_pointer:
    .word 31
    .long gdt
    .align 8
idt_pointer:
    .word 48 * 16 - 1
    .quad IDT
boot_info:
    .long 0

    .section .bss
    .align 4096
top:            .skip 4096
pointers:       .skip 4096
directories:    .skip 64 * 4096
stack:          .skip 131072
stack_end:
                .skip ({cpus} - 1) * 4096
"#,
    cpus = const MOST_CPUS,
    trampoline = const TRAMPOLINE,
);

/// How many processors there is room for.
pub const MOST_CPUS: usize = 64;

/// Where the other processors start: the only page of low memory that is written.
pub const TRAMPOLINE: u64 = 0x8000;

/// An interrupt gate.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Gate([u16; 8]);

impl Gate {
    pub const NONE: Self = Self([0; 8]);

    pub fn to(handler: u64) -> Self {
        let part = |shift: u32| (handler >> shift) as u16;
        Self([part(0), 8, 0x8e00, part(16), part(32), part(48), 0, 0])
    }
}

unsafe extern "C" {
    /// The handler of the interrupts that wake the guest.
    pub fn tick();
    /// The handler of the interrupts that processors send each other.
    pub fn wake();
    /// The code at which the other processors start, once it is at [`TRAMPOLINE`].
    pub static trampoline: u8;
    /// Its end.
    pub static trampoline_end: u8;
}
