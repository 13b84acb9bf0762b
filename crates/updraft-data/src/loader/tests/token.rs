//! Which states of loaders are taken, and what is said of the others.

use super::*;

#[test]
fn a_token_says_what_differs_and_what_may_be_accepted() {
    let of = |recipe: Value, options: LoaderOptions| {
        let sources = if recipe.get("sources").is_some() { vec![vec![100; 10]; 2] } else { vec![vec![100; 10]] };
        Loader::new(dataset(&sources, recipe), options).unwrap()
    };
    let score = json!({ "tensors": [{ "name": "score" }] });
    let plain = of(score.clone(), options(48, 24));
    let token = plain.token(9).unwrap();
    assert!(serde_json::to_string(&token).unwrap().len() < 1024);
    let other = |change: &dyn Fn(&mut LoaderOptions)| {
        let mut options = options(48, 24);
        change(&mut options);
        of(score.clone(), options).resume(&token).unwrap_err().to_string()
    };
    assert!(other(&|o| o.seed = 12).contains("the seed was 11 and is now 12"));
    assert!(other(&|o| o.batch_size = 24).contains("the batch size"));
    assert!(other(&|o| o.lanes = Some(48)).contains("the number of lanes was Some(24)"));
    assert!(other(&|o| o.tail = Tail::Pad).contains("the tail"));
    let cast = json!({ "tensors": [{ "name": "score", "transform": [{ "cast": "f32" }] }] });
    let cast = of(cast, options(48, 24));
    assert!(cast.resume(&token).unwrap_err().to_string().contains("the transforms"));
    assert_eq!(cast.resume_accepting(&token, &[Drift::Pipeline]).unwrap(), 9);
    assert!(cast.resume_accepting(&token, &[Drift::Tail]).is_err());

    let mixed = |weights: [f64; 2], later: Value| {
        let sources = json!([{ "path": "a", "weight": weights[0] }, { "path": "b", "weight": weights[1] }]);
        of(json!({ "tensors": [{ "name": "score" }], "sources": sources, "weights": later }), options(48, 24))
    };
    let token = mixed([1.0, 2.0], json!([])).token(9).unwrap();
    let changed = mixed([2.0, 1.0], json!([]));
    assert!(changed.resume(&token).unwrap_err().to_string().contains("the weights of the mixture"));
    assert_eq!(changed.resume_accepting(&token, &[Drift::Weights]).unwrap(), 9);
    // Weights that change later than the token leave what was before as it is.
    assert_eq!(mixed([1.0, 2.0], json!([{ "from": 9 * 48, "weights": [0.0, 1.0] }])).resume(&token).unwrap(), 9);
    assert!(mixed([1.0, 2.0], json!([{ "from": 8 * 48, "weights": [0.0, 1.0] }])).resume(&token).is_err());

    let of_other_data = Loader::new(dataset(&[vec![100; 11]], score.clone()), options(48, 24)).unwrap();
    let token = plain.token(9).unwrap();
    assert!(of_other_data.resume(&token).unwrap_err().to_string().contains("the number of samples was 1000"));
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut token = serde_json::to_value(&token).unwrap();
        change(&mut token);
        serde_json::from_value::<LoaderToken>(token)
            .map_err(|e| e.to_string())
            .and_then(|token| plain.resume(&token).map_err(|e| e.to_string()))
    };
    assert_eq!(changed(&|_| {}), Ok(9));
    for (field, value, word) in [
        ("format", json!(2), "the format of the loader's state was 2 and is now 1"),
        ("dataset", json!(Digest::of(b"other")), "the dataset was"),
        ("shuffle", json!("none"), "the shuffle"),
        ("next_step", json!(u64::MAX), "the next step"),
        ("carried", json!({ "0": { "at": 3 } }), "what is carried was of lane 0"),
        ("lane_count", json!(1), "unknown field `lane_count`"),
    ] {
        let error = changed(&|token| token[field] = value.clone()).unwrap_err();
        assert!(error.contains(word), "{field}: {error}");
    }

    // One rank's token is not enough for all lanes.
    let (_, packed) = ways().pop().unwrap();
    let two = ranks(&packed, &options(48, 24), 2);
    let tokens: Vec<LoaderToken> = two.iter().map(|l| l.token(3).unwrap()).collect();
    let error = ranks(&packed, &options(48, 24), 1)[0].resume(&tokens[0]).unwrap_err().to_string();
    assert!(error.contains("lane 12") && error.contains("merge"), "{error}");
    assert!(LoaderToken::merge(&[tokens[0].clone(), tokens[0].clone()]).is_err());
}

#[test]
fn what_lanes_cannot_carry_is_refused() {
    for (name, dataset) in ways() {
        if !dataset.is_many_to_one() {
            continue;
        }
        let loader = &ranks(&dataset, &options(48, 24), 1)[0];
        let token = serde_json::to_value(loader.token(3).unwrap()).unwrap();
        let samples = dataset.len();
        let refused = |lane: &str, carried: Value| {
            let mut token = token.clone();
            token["carried"][lane] = carried;
            let token: LoaderToken = serde_json::from_value(token).unwrap();
            loader.resume(&token).unwrap_err().to_string()
        };
        let piece = |sample: u64, offset: u64, len: u64| json!([sample, offset, len]);
        for (carried, word) in [
            (json!({ "at": u64::MAX }), "samples taken"),
            (json!({ "at": 1, "rest": piece(samples, 0, 1) }), &*format!("sample {samples}")),
            (json!({ "at": 1, "rest": piece(0, u64::MAX, 2) }), "tokens after"),
            (json!({ "at": 1, "rest": piece(0, 1, 0) }), "0 tokens after 1"),
            (json!({ "at": 1, "open": [[piece(0, 0, 64)]] }), "open row"),
            (json!({ "at": 1, "open": [[]] }), "open row"),
            (json!({ "at": 1, "open": vec![[piece(0, 0, 1)]; 5] }), "5 open rows"),
        ] {
            let error = refused("7", carried.clone());
            assert!(error.contains("what is carried") && error.contains("lane 7"), "{name}: {carried}: {error}");
            assert!(error.contains(word), "{name}: {carried}: {error}");
        }
        assert!(refused("24", json!({ "at": 1 })).contains("of lane 24"), "{name}");
    }
}
