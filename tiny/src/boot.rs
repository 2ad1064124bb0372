//! From multiboot's 32-bit entry to 64-bit Rust: page tables, SSE, interrupts.

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

    mov eax, cr4
    or eax, 0x620               /* PAE, SSE and its exceptions */
    mov cr4, eax
    lea eax, top
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100               /* long mode */
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb         /* no emulation of the FPU */
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
    lea rsp, [rip + stack_end]
    lidt [rip + idt_pointer]
    mov edi, dword ptr [rip + boot_info]
    call main
9:  hlt
    jmp 9b

    /* Interrupts only end a `hlt`. */
    .global tick
tick:
    push rax
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq

    .section .data
    .align 8
gdt:
    .quad 0
    .quad 0x00af9a000000ffff
    .quad 0x00cf92000000ffff
gdt_pointer:
    .word 23
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
"#
);

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
}
