use proptest::prelude::*;
use ramet_memory::{PageCount, PageIndex};

use super::*;

fn map(colors: Vec<Color>) -> ColorMap {
    let mut map = ColorMap::unknown(PageCount(colors.len() as u64), "");
    map.colors = colors;
    map
}

/// A decoded PNG.
struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<[u8; 3]>,
}

impl Picture {
    fn of(map: &ColorMap, options: &Options<'_>) -> Self {
        let file = png(map, options).unwrap();
        let mut decoder = ::png::Decoder::new(std::io::Cursor::new(file));
        decoder.set_transformations(::png::Transformations::EXPAND);
        let mut reader = decoder.read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        assert_eq!(info.color_type, ::png::ColorType::Rgb);
        Self { width: info.width, height: info.height, pixels: bytes.as_chunks().0.to_vec() }
    }

    /// The pixels in the middle and in the corners of a page's cell.
    fn cell(&self, map: &ColorMap, options: &Options<'_>, page: u64) -> [u8; 3] {
        let scene = Scene::of(map, options);
        let (cell, side) = ((page / scene.grid.pages_per_cell) as u32, scene.grid.side);
        let x = scene.origin.0 + cell % scene.grid.columns * side;
        let y = scene.origin.1 + cell / scene.grid.columns * side;
        let at = |x: u32, y: u32| self.pixels[(y * self.width + x) as usize];
        let middle = at(x + side / 2, y + side / 2);
        for (x, y) in [(x, y), (x + side - 1, y), (x, y + side - 1), (x + side - 1, y + side - 1)] {
            assert_eq!(at(x, y), middle, "a cell has one color");
        }
        middle
    }
}

/// Cells of every color in an SVG, by the colors' numbers: the areas of its paths.
fn areas(text: &str) -> Vec<u64> {
    let document = roxmltree::Document::parse(text).unwrap();
    let cells = document.descendants().find(|node| node.attribute("id") == Some("cells")).unwrap();
    let area = |color: Color| {
        let [red, green, blue] = rgb(color);
        let fill = format!("#{red:02x}{green:02x}{blue:02x}");
        let path = cells.children().find(|node| node.attribute("fill") == Some(&fill));
        path.map_or(0, |path| run_lengths(path.attribute("d").unwrap()).into_iter().sum())
    };
    Color::ALL.into_iter().map(area).collect()
}

fn run_lengths(path: &str) -> Vec<u64> {
    path.split_terminator('z')
        .map(|run| {
            let (_, there_and_back) = run.split_once('h').unwrap();
            let (there, back) = there_and_back.split_once("v1h-").unwrap();
            assert_eq!(there, back);
            there.parse().unwrap()
        })
        .collect()
}

fn count(colors: impl Iterator<Item = Color>) -> Vec<u64> {
    let mut counts = vec![0; Color::ALL.len()];
    for color in colors {
        counts[color as usize] += 1;
    }
    counts
}

#[test]
fn every_page_has_a_cell_of_its_color() {
    let map = map((0..5000u32).map(|page| Color::ALL[(page * 7 / 3 % 11) as usize]).collect());
    let options = Options { title: "t", changed: None };
    let picture = Picture::of(&map, &options);
    for page in 0..5000 {
        assert_eq!(picture.cell(&map, &options, page), rgb(map.color(PageIndex(page))), "page {page}");
    }
    assert_eq!(areas(&svg(&map, &options)), count(map.colors().iter().copied()));
}

#[test]
fn only_changed_pages_are_drawn_when_they_are_given() {
    let map = map(vec![Color::UserData; 3000]);
    let mut changed = PageSet::new(PageCount(4000));
    for page in [0, 1, 77, 2999, 3500] {
        changed.insert(PageIndex(page));
    }
    let options = Options { title: "t", changed: Some(&changed) };
    let picture = Picture::of(&map, &options);
    for page in 0..3000 {
        let expected = if changed.contains(PageIndex(page)) { rgb(Color::UserData) } else { Ink::LIGHT.rgb() };
        assert_eq!(picture.cell(&map, &options, page), expected, "page {page}");
    }
    let text = svg(&map, &options);
    assert_eq!(areas(&text)[Color::UserData as usize], 4);
    assert!(text.contains("4 of 3000 pages changed"), "{text}");
    assert!(text.contains("unchanged") && text.contains("2996 pages"));
}

#[test]
fn a_cell_for_several_pages_has_the_color_of_most() {
    let mut colors = vec![Color::Free; (4 << 20) + 1];
    colors[4..7].fill(Color::Slab);
    colors[8..10].fill(Color::CacheData);
    colors[16] = Color::UserCode;
    let map = map(colors);
    let options = Options::default();
    let scene = Scene::of(&map, &options);
    assert_eq!(scene.grid.pages_per_cell, 8, "a power of two");
    let cells: Vec<_> = scene.grid.cells[..4].iter().flatten().copied().collect();
    assert_eq!(cells, [Color::Free; 4]);

    let mut changed = PageSet::new(map.pages());
    for page in [3, 4, 5, 8, 12, 17] {
        changed.insert(PageIndex(page));
    }
    let scene = Scene::of(&map, &Options { title: "", changed: Some(&changed) });
    assert_eq!(scene.grid.cells[0], Some(Color::Slab), "unchanged pages of a cell do not count");
    assert_eq!(scene.grid.cells[1], Some(Color::CacheData), "the lower number of two as frequent");
    assert_eq!(scene.grid.cells[2..4], [Some(Color::Free), None]);
}

#[test]
fn pictures_of_all_sizes_are_wide_and_not_too_large() {
    for shift in 0..26 {
        for pages in [(1u64 << shift) - 1, 1 << shift, (1 << shift) + 1] {
            let (side, columns, rows) = shape(pages);
            let (width, height) = (u64::from(side * columns), u64::from(side * rows));
            assert!((1024..=1536).contains(&width) && height <= 1024, "{pages} pages: {width} by {height}");
        }
    }
    assert_eq!(shape(131_072), (3, 512, 256), "512M");
}

/// Side, columns and rows of a guest's cells.
fn shape(pages: u64) -> (u32, u32, u32) {
    let grid = grid::Grid::of(&map(vec![Color::Free; pages as usize]), None);
    (grid.side, grid.columns, grid.rows())
}

#[test]
fn an_empty_map_and_one_page_make_pictures() {
    let empty = map(Vec::new());
    let options = Options { title: "nothing", changed: None };
    let picture = Picture::of(&empty, &options);
    assert!(picture.height > 100, "there is still a legend");
    assert_eq!(areas(&svg(&empty, &options)), [0; 11]);

    let one = map(vec![Color::KernelCode]);
    let picture = Picture::of(&one, &options);
    assert_eq!(picture.cell(&one, &options, 0), rgb(Color::KernelCode));
    assert_eq!(areas(&svg(&one, &options)).iter().sum::<u64>(), 1);
    let none = PageSet::default();
    let options = Options { title: "", changed: Some(&none) };
    assert_eq!(Picture::of(&one, &options).cell(&one, &options, 0), Ink::LIGHT.rgb());
}

#[test]
fn titles_are_escaped_and_cut() {
    let map = map(vec![Color::Free]);
    let shown = |title: &str| {
        let text = svg(&map, &Options { title, changed: None });
        let document = roxmltree::Document::parse(&text).unwrap();
        let first = document.descendants().find(|node| node.has_tag_name("text")).unwrap();
        Picture::of(&map, &Options { title, changed: None });
        first.text().unwrap_or_default().to_owned()
    };
    assert_eq!(shown("<&\"'>]]>"), "<&\"'>]]>");
    assert_eq!(shown("a\nb\0c\u{ffff}d\u{9f}…"), "a b c d …");
    let long = shown(&"é<".repeat(500));
    assert!(long.ends_with("...") && long.chars().count() < 120, "{long}");
}

#[test]
fn a_large_guest_is_a_small_file() {
    let map = map((0..131_072u64).map(|page| Color::ALL[(page * page / 5000 % 11) as usize]).collect());
    let options = Options { title: "512M", changed: None };
    assert!(png(&map, &options).unwrap().len() < 500_000);
    let worst = self::map((0..1u64 << 20).map(|page| Color::ALL[(page % 11) as usize]).collect());
    assert!(svg(&worst, &options).len() < 16 << 20);
}

#[test]
fn texts_stay_within_the_picture_and_apart() {
    for pages in [0, 1, 131_072, 1 << 22] {
        let map = map(vec![Color::Vmalloc; pages]);
        let all = PageSet::new(map.pages());
        for options in
            [Options { title: "t", changed: None }, Options { title: &"long ".repeat(99), changed: Some(&all) }]
        {
            let scene = Scene::of(&map, &options);
            let boxes: Vec<_> = scene.texts.iter().map(extent).collect();
            for (at, a) in boxes.iter().enumerate() {
                assert!(scene.width <= 1600 && scene.height <= 1250);
                assert!(a.0 >= 0 && a.1 <= i64::from(scene.width) && a.3 <= i64::from(scene.height), "{a:?}");
                assert!(boxes[..at].iter().all(|b| a.0 >= b.1 || b.0 >= a.1 || a.2 >= b.3 || b.2 >= a.3), "{a:?}");
            }
        }
    }
}

/// Left, right, top and bottom of a text.
fn extent(text: &scene::Text) -> (i64, i64, i64, i64) {
    let long = text.text.chars().count() as i64 * i64::from(text.size.char_width());
    let left = i64::from(text.x) - if text.side == scene::Side::End { long } else { 0 };
    let height = if text.size == scene::Size::Title { 20 } else { 13 };
    (left, left + long, text.y.into(), i64::from(text.y) + height)
}

proptest! {
    #[test]
    fn areas_of_an_svg_are_the_maps(numbers in prop::collection::vec((0usize..11, 1usize..90), 0..60)) {
        let colors: Vec<_> =
            numbers.into_iter().flat_map(|(number, times)| vec![Color::ALL[number]; times]).collect();
        let map = map(colors);
        let text = svg(&map, &Options { title: "&", changed: None });
        prop_assert_eq!(areas(&text), count(map.colors().iter().copied()));
    }
}
